"""Measure paths between held-out cars: futurism, similarity, smoothness and norms along each.

    python studies/blend.py toys   --common runs/common --futuristic runs/futuristic --encoder runs/encoder
    python studies/blend.py photos --common runs/common --futuristic runs/futuristic --encoder runs/encoder \\
        --heldout HELDOUT.zip --concepts CONCEPTS_HELDOUT.zip --probe runs/probe --backbone MOBILENET.safetensors

Where --probe does not exist yet, it is fitted on --train and --train-concepts first. One record goes to
data/records/blend_NAME.json."""

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch
from _record import save_record
from tqdm import tqdm

from carproto.blend.interpolate import blend_frames, blend_latents
from carproto.blend.path_metrics import factor_drift, measure_paths, mid_blend_realism, perceptual_path_length
from carproto.blend.path_planning import plan_path
from carproto.blend.speed import plan_speed
from carproto.config import CarprotoError, InvertConfig
from carproto.core import sample_latents, seeded
from carproto.data.dataset import open_cars
from carproto.eval.features import extract_features, feature_extractor
from carproto.eval.futurism import FuturismProbe, fit_futurism_probe, futurism_scale
from carproto.eval.perceptual import PerceptualDistance, discriminator_features
from carproto.gan.train import best_generator, load_discriminator
from carproto.images import to_tensor
from carproto.latent.encoder import load_encoder
from carproto.latent.invert import invert
from carproto.toycars.regressor import factor_regressor

POSITIONS = torch.linspace(0, 1, 11)
PATHS = {  # how latent and generator move, and the path between the latents
    "mean of the latents, futuristic generator (the 2022 baseline)": ({"generator": [1.0] * 11}, "lerp"),
    "lerp": ({}, "lerp"),
    "slerp": ({}, "slerp"),
    "norm": ({}, "norm"),
    "latent only": ({"generator": False}, "norm"),
    "generator only": ({"latent": False}, "norm"),
}


def fit_probe(folder: Path, arguments: argparse.Namespace, size: int) -> None:
    """Fit a futurism probe on training photos and evaluate it on held-out ones."""
    extractor = feature_extractor(arguments.backbone, size=arguments.extractor_size)
    sets = [
        open_cars(path, size, split=None).images
        for path in (arguments.train, arguments.train_concepts, arguments.heldout, arguments.concepts)
    ]
    few = sets[0][torch.randperm(len(sets[0]), generator=seeded(0))[:3000]]
    common, concept, low, high = (extract_features(images, extractor, show_bar=True) for images in (few, *sets[1:]))
    probe = fit_futurism_probe(common, concept, extractor=extractor.name)
    low, high = probe.logit(low), probe.logit(high)
    probe.report |= {
        "n_heldout": [len(low), len(high)],
        "heldout_accuracy": ((low < 0).float().mean() + (high > 0).float().mean()).item() / 2,
        "heldout_auc": (high[:, None] > low).float().mean().item(),
        "heldout_logit": {
            "common": [low.mean().item(), low.std().item()],
            "concept": [high.mean().item(), high.std().item()],
        },
    }
    probe.save(folder)


def invert_cars(
    images: torch.Tensor, n: int, G, E, metric: PerceptualDistance, use_channel_gains: bool = False
) -> list[tuple]:
    """Invert held-out cars to latents near the prior's norm and channel gains; a small set is used more than once."""
    order = torch.cat([torch.randperm(len(images), generator=seeded(i)) for i in range(-(-n // len(images)))])[:n]
    config = InvertConfig(steps=60, norm_slack=0.049, use_channel_gains=use_channel_gains)
    results = invert(to_tensor(images[order]), G, E, perceptual=metric, config=config)
    return list(zip(results.z, results.channel_gains if use_channel_gains else [None] * n))


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("toys", "photos"))
    for option in ("common", "futuristic", "encoder"):
        parser.add_argument(f"--{option}", type=Path, required=True, help="a run's folder")
    for option in ("heldout", "concepts", "train", "train-concepts", "backbone"):
        parser.add_argument(f"--{option}", default="", help="for photos: a folder or zip, or the MobileNetV2 file")
    parser.add_argument(
        "--probe", type=Path, default=Path("runs/probe"), help="for photos: the futurism probe's folder"
    )
    parser.add_argument("--extractor-size", type=int, default=96, help="pixels that the backbone sees")
    parser.add_argument("--n", type=int, default=200, help="pairs")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    common, futuristic = (best_generator(path, "cpu") for path in (arguments.common, arguments.futuristic))
    E = load_encoder(arguments.encoder / "encoder", fingerprint=common.fingerprint(), device="cpu")
    metric = PerceptualDistance(discriminator_features(load_discriminator(arguments.common, "cpu")))
    if arguments.name == "toys":
        regressor = factor_regressor()
        heldout = open_cars("toycars", common.size, split="heldout").images
        concepts = open_cars("toycars-futuristic", common.size, split="heldout").images
        scale, extractor = futurism_scale("toys"), feature_extractor("toys")
    else:
        if not (arguments.heldout and arguments.concepts and arguments.backbone):
            raise CarprotoError("photos need --heldout, --concepts and --backbone")
        if not (arguments.probe / "config.json").exists():
            fit_probe(arguments.probe, arguments, common.size)
        heldout, concepts = (
            open_cars(path, common.size, split=None).images for path in (arguments.heldout, arguments.concepts)
        )
        scale = futurism_scale(arguments.probe, arguments.backbone)
        extractor = feature_extractor(arguments.backbone, size=arguments.extractor_size)
    sides = (heldout, common), (concepts, futuristic)
    plain, closer = (
        [invert_cars(images, arguments.n, G, E, metric, use_channel_gains) for images, G in sides]
        for use_channel_gains in (False, True)
    )
    z_a, z_b = ([latent for latent, _ in cars] for cars in plain)
    with torch.no_grad():
        apart = sample_latents(128, common.z_dim, seed=5)
        reference = metric(common(apart[:64]), common(apart[64:])).mean().item()

    def make_frames(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, options: dict, mode: str) -> torch.Tensor:
        return blend_frames(common, futuristic, a, b, w, mode=mode, **options)

    def make_both(
        a: torch.Tensor, b: torch.Tensor, options: dict, mode: str, latent: torch.Tensor, generator: torch.Tensor
    ) -> torch.Tensor:
        return make_frames(a, b, latent, {**options, "latent": latent, "generator": generator}, mode)

    def measure(name: str, options: dict, mode: str, planned: str = "", cars: list = plain) -> dict:
        paths, shares = [], []
        for (a, channel_gains_a), (b, channel_gains_b) in zip(tqdm(cars[0], desc=name, unit="pair"), cars[1]):
            w, moves = POSITIONS, {**options, "channel_gains": (channel_gains_a, channel_gains_b)}
            if planned == "calibrated":
                along = partial(make_frames, a, b, options={}, mode=mode)
                speed = plan_speed(along, scale, n=25, perceptual=metric)
                w, _ = speed(POSITIONS), shares.append(speed.share)
            elif planned == "planned":
                plan = plan_path(partial(make_both, a, b, moves, mode), scale, perceptual=metric)
                w, generator = plan(POSITIONS)
                moves = {**moves, "latent": w, "generator": generator}
            moving = torch.zeros(len(w)) if options.get("latent") is False else w
            paths.append((make_frames(a, b, w, moves, mode), blend_latents(a, b, moving, mode)))
        results = measure_paths(paths, futurism=scale, perceptual=metric, reference=reference)
        return {**results, "median_share": torch.tensor(shares).median().item()} if shares else results

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of pairs whose last car is no more futuristic than the first: they are counted
        by_path = {name: measure(name, *way) for name, way in PATHS.items()}
        by_path["norm, calibrated"] = measure("norm, calibrated", {}, "norm", "calibrated")
        by_path["norm, planned"] = measure("norm, planned", {}, "norm", "planned")
        by_path["norm, planned, with channel gains"] = measure(
            "norm, planned, with channel gains", {}, "norm", "planned", closer
        )
    lengths = {}
    for mode in ("lerp", "slerp", "norm"):
        draws = [lambda w, a=a, b=b, mode=mode: make_frames(a, b, w, {}, mode) for a, b in zip(z_a[:100], z_b[:100])]
        results = perceptual_path_length(draws, metric)
        lengths[mode] = {"mean": results.mean().item(), "median": results.median().item(), "n": len(results)}
    with torch.no_grad():
        generated = [
            torch.cat([G(z) for z in sample_latents(500, common.z_dim, seed=3).split(50)]) for G in (common, futuristic)
        ]
    before, after = (scale(images) for images in generated)
    pooled = ((before.var() + after.var()) / 2).sqrt()
    record = {
        "seed": 0,
        "n_pairs": arguments.n,
        "n_heldout": [len(heldout), len(concepts)],
        "generators": {"common": common.fingerprint(), "futuristic": futuristic.fingerprint(), **common.config()},
        "reference": reference,
        "paths": by_path,
        "path_length": lengths,
        "realism": {f"w {w}": mid_blend_realism(common, futuristic, extractor, w=w) for w in (0.25, 0.5, 0.75)},
        "freezed": {
            "common": before.mean().item(),
            "futuristic": after.mean().item(),
            "effect_size": ((after.mean() - before.mean()) / pooled).item(),
            "held_out_common": scale(heldout).mean().item(),
            "held_out_concepts": scale(concepts).mean().item(),
            "same_latent_distance": metric(generated[0][:200], generated[1][:200]).mean().item(),
            "other_latent_distance": metric(generated[0][:200], generated[1][200:400]).mean().item(),
        },
    }
    if arguments.name == "toys":
        record["factors"] = factor_drift(common, futuristic, regressor)
    else:
        record["probe"] = FuturismProbe.load(arguments.probe).report
    save_record(record, arguments.out / f"blend_{arguments.name}.json")
    for name, results in by_path.items():
        shares = " ".join(
            f"{key} {results[key]:.0%}" for key in ("share_spearman_0.95", "share_steps_3x", "share_norms_5pct")
        )
        print(f"{name:70} {shares}")


if __name__ == "__main__":
    main()
