"""Measure calibrated blends of held-out photos: is futurism even, is each frame a car, and are both ends kept?

    python studies/photo_blends.py photo64 --data COMMON.zip --heldout HELDOUT.zip --concepts CONCEPTS.zip \\
        --concepts_heldout CONCEPTS_HELDOUT.zip --masks FOLDER --aspect 1.4 --extractor MOBILENET.safetensors

A pair is a held-out common photo and a held-out concept photo, both refined; the small set is used more than once.
Futurism is measured twice: by the pair's own probe, which calibrates, and by one on MobileNetV2's features, which does
not. The latter is fitted to grey copies of photos: concept cars are painted more brightly than cars for sale.

A frame's realism is its distance to the nearest training photo, of either kind, in MobileNetV2's features at 96 px. The
limit is the distance that 5 % of held-out photos exceed. It is taken for each kind: concept cars differ more from each
other, and their training set is smaller, so real ones lie further off. Each frame's limit is interpolated by its
intensity, from that of common photos to that of concept photos. One limit for all held-out photos together would follow
from how many of each kind were collected, here ten common ones to one. It is reported too (`realism_pooled`), with the
share of real photos of each kind beyond it."""

import argparse
import time
import warnings
from dataclasses import fields, replace

import torch
from _record import run_or_exit, save_and_print
from photo_quality import SETS, make_parser, open_sets, with_steps
from torchvision.transforms.functional import rgb_to_grayscale

from carproto.app.photos import PhotoInversion
from carproto.app.pipeline import CarPipeline
from carproto.blend.interpolate import blend_latents
from carproto.blend.path_metrics import measure_paths
from carproto.blend.recipe import BlendRecipe
from carproto.blend.speed import rank_correlation
from carproto.config import CarprotoError
from carproto.core import progress, sample_latents, seeded
from carproto.data.align import AlignConfig
from carproto.eval.features import FeatureExtractor, extract_features, mobilenet_extractor
from carproto.eval.futurism import fit_futurism_probe
from carproto.eval.reconstruction import foreground, mask_iou
from carproto.images import to_bytes, to_tensor

POSITIONS = [i / 10 for i in range(11)]
RARE = 0.05  # share of held-out photos of a kind that are further from the training photos than its limit


def select(inversions: PhotoInversion, i: int) -> PhotoInversion:
    """Return the inversion of one photo."""
    values = {field.name: getattr(inversions, field.name) for field in fields(inversions)}
    rows = {name: value[i : i + 1] for name, value in values.items() if isinstance(value, (torch.Tensor, list))}
    return replace(inversions, **{**rows, "outliers": []})


def nearest_distance(features: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Return the distance of each row to the nearest training photo."""
    return torch.cat([torch.cdist(part, train).amin(1) for part in features.split(256)])


def plan_pairs(pipe: CarPipeline, cars: list[PhotoInversion], n: int) -> list[BlendRecipe]:
    """Calibrate n pairs; each set is shuffled anew where it is used up."""
    orders = []
    for seed, inversions in enumerate(cars):
        rounds = range(-(-n // len(inversions.z)))
        orders.append(
            torch.cat([torch.randperm(len(inversions.z), generator=seeded(seed + 2 * i)) for i in rounds])[:n]
        )
    recipes = []
    with progress(n, "calibrate", unit="pair") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of pairs where futurism does not rise: they are counted
        for a, b in zip(*(order.tolist() for order in orders)):
            recipe = pipe.plan_blend(select(cars[0], a), select(cars[1], b), POSITIONS)
            recipes.append(replace(recipe, car_a=str(a), car_b=str(b)))
            bar.update()
    return recipes


def follow(recipes: list[BlendRecipe], pipe: CarPipeline, reference: float) -> tuple[list[torch.Tensor], dict]:
    """Generate each pair's frames; measure futurism by the pair's own probe, and the steps between frames."""
    frames = [recipe.generate(*pipe.generators) for recipe in recipes]
    latents = [
        blend_latents(torch.tensor(recipe.z_a), torch.tensor(recipe.z_b), torch.tensor(recipe.latent), recipe.mode)
        for recipe in recipes
    ]
    options = {"futurism": pipe.futurism, "perceptual": pipe.perceptual, "reference": reference}
    return frames, measure_paths(zip(frames, latents), **options)


def measure_ends(recipes: list[BlendRecipe], frames: list[torch.Tensor], pipe: CarPipeline, cars: list) -> dict:
    """Compare the first frame with the inversion, and the futuristic end with what the child generates."""
    background = AlignConfig().background

    def outlines(images: torch.Tensor) -> torch.Tensor:
        return foreground(images, background)

    first, last = (torch.stack([path[i] for path in frames]) for i in (0, -1))
    rows_a, rows_b = ([int(getattr(recipe, name)) for recipe in recipes] for name in ("car_a", "car_b"))
    inverted = cars[0].images[rows_a]
    z, gains = cars[0].z[rows_a], cars[0].channel_gains[rows_a]
    z_b, gains_b = (torch.tensor(values) for values in zip(*(cars[1].car(i) for i in rows_b)))
    end = pipe.generate(kind="futuristic", z=z_b, channel_gains=gains_b)
    common, child, bare = (
        pipe.generate(kind=kind, z=z, channel_gains=some)
        for kind, some in (("common", gains), ("futuristic", gains), ("futuristic", None))
    )
    is_same = (to_bytes(first) == to_bytes(inverted)).flatten(1).all(1)
    return {
        "first_frame_is_the_inversion_in_bytes": is_same.float().mean().item(),
        "first_frame_max_difference": (first - inverted).abs().max().item(),
        "last_frame_to_child_mask_iou": mask_iou(outlines(last), outlines(end)).mean().item(),
        "same_latent_child_to_common_mask_iou": mask_iou(outlines(child), outlines(common)).mean().item(),
        "same_latent_child_with_and_without_gains_mask_iou": mask_iou(outlines(child), outlines(bare)).mean().item(),
    }


def share_beyond(frames: torch.Tensor, limits: torch.Tensor, photos: list[torch.Tensor]) -> dict:
    """Count frames (pairs, n) beyond limits (n,), and the first and last photos (pairs,) of the same pairs."""
    far = frames > limits
    ends = [some > limit for some, limit in zip(photos, limits[[0, -1]])]
    return {
        "share_of_frames_beyond": far.float().mean().item(),
        "share_of_pairs_with_a_frame_beyond": far.any(1).float().mean().item(),
        "share_beyond_by_intensity": far.float().mean(0).tolist(),
        "share_of_pairs_with_a_photo_beyond": (ends[0] | ends[1]).float().mean().item(),
    }


def measure_realism(
    features: torch.Tensor, rows: list[list[int]], train: torch.Tensor, unseen: list[torch.Tensor]
) -> dict:
    """Compare the frames' distances to training photos with those of held-out photos, by kind and pooled.

    Rows are the indices of each pair's common photo, and of its concept photo, in the held-out sets."""
    frames = nearest_distance(features, train).view(len(rows[0]), -1)
    distances = [nearest_distance(some, train) for some in unseen]
    photos = [some[chosen] for some, chosen in zip(distances, rows)]
    low, high, pooled = (some.quantile(1 - RARE) for some in (*distances, torch.cat(distances)))
    limits = torch.lerp(low, high, torch.linspace(0, 1, frames.shape[1]))
    shares = [(some > pooled).float().mean().item() for some in distances]
    return {
        "realism": {
            "limits": {"common": low.item(), "futuristic": high.item()},
            "n_heldout": [len(some) for some in unseen],
            **share_beyond(frames, limits, photos),
        },
        "realism_pooled": {
            "limit": pooled.item(),
            "share_of_heldout_photos_beyond": dict(zip(("common", "futuristic"), shares)),
            **share_beyond(frames, pooled.expand(frames.shape[1]), photos),
        },
    }


def measure_by_other_features(
    sets: dict, recipes: list[BlendRecipe], frames: list[torch.Tensor], extractor: FeatureExtractor
) -> dict:
    """Measure realism, and futurism by a probe that did not calibrate."""
    features = {name: extract_features(images, extractor, show_bar=True) for name, images in sets.items()}
    along = extract_features(torch.cat(frames), extractor, show_bar=True)
    train, unseen = torch.cat([features[name] for name in SETS[::2]]), [features[name] for name in SETS[1::2]]
    rows = [[int(getattr(recipe, name)) for recipe in recipes] for name in ("car_a", "car_b")]
    grey = {name: extract_features(rgb_to_grayscale(x, 3), extractor, show_bar=True) for name, x in sets.items()}
    grey_along = extract_features(rgb_to_grayscale(torch.cat(frames), 3), extractor, show_bar=True)
    probe = fit_futurism_probe(grey["data"], grey["concepts"], extractor=extractor.name)
    low, high = (probe.logit(grey[name]) for name in ("heldout", "concepts_heldout"))
    scores = ((probe.logit(grey_along) - low.mean()) / (high.mean() - low.mean())).view(len(frames), -1)
    spearman = torch.tensor([rank_correlation(POSITIONS, row) for row in scores])
    return {
        **measure_realism(along, rows, train, unseen),
        "other_probe": {
            "extractor": f"{extractor.name}, grey copies",
            "heldout_auc": (high[:, None] > low).float().mean().item(),
            "share_spearman_0.95": (spearman >= 0.95).float().mean().item(),
            "share_spearman_0.8": (spearman >= 0.8).float().mean().item(),
            "median_spearman": spearman.median().item(),
            "share_rising": (scores[:, -1] > scores[:, 0]).float().mean().item(),
            "futurism_by_intensity": scores.mean(0).tolist(),
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = make_parser(__doc__.splitlines()[0], "photo_blends.json")
    parser.add_argument("--n", type=int, default=200, help="pairs")
    arguments: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    pipe = CarPipeline.from_pretrained(arguments.release)
    if pipe.futuristic is None or pipe.futurism is None or pipe.encoder is None:
        raise CarprotoError(
            f"{arguments.release} cannot blend photos: it needs both generators, an encoder and a probe"
        )
    extractor = mobilenet_extractor(arguments.extractor, 96)
    sets = open_sets(arguments, pipe.common.size)
    cars = []
    for name, kind in (("heldout", "common"), ("concepts_heldout", "futuristic")):
        x = to_tensor(sets[name][: arguments.n])
        cars.append(pipe.encode(x, kind, config=with_steps(pipe, arguments.steps), warn=False, quiet=False))
    recipes = plan_pairs(pipe, cars, arguments.n)
    z = sample_latents(128, pipe.common.z_dim, seed=5)
    reference = pipe.perceptual(pipe.generate(z=z[:64]), pipe.generate(z=z[64:])).mean().item()
    frames, calibrated = follow(recipes, pipe, reference)
    straight = follow([replace(recipe, latent=POSITIONS, generator=POSITIONS) for recipe in recipes], pipe, reference)[
        1
    ]
    record = {
        "release": arguments.release,
        "fingerprints": pipe.fingerprints,
        "n": len(recipes),
        "n_heldout": [len(some.z) for some in cars],
        "steps": arguments.steps,
        "seeds": "pairs: 0 and 1",
        "calibrated": calibrated,
        "straight": straight,
        "ends": measure_ends(recipes, frames, pipe, cars),
    }
    record |= measure_by_other_features(sets, recipes, frames, extractor)
    record["seconds"] = round(time.monotonic() - start)
    save_and_print(record, arguments.out)


if __name__ == "__main__":
    run_or_exit(main)
