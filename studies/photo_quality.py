"""Measure a released pair of aligned photos: samples of both generators, and inversions of held-out photos.

    python studies/photo_quality.py photo64 --data COMMON.zip --heldout HELDOUT.zip --concepts CONCEPTS.zip \\
        --concepts_heldout CONCEPTS_HELDOUT.zip --masks FOLDER --aspect 1.4 --extractor MOBILENET.safetensors \\
        --squeezenet SQUEEZENET.safetensors

MobileNetV2 at 96 px measures; training never saw it. LPIPS takes SqueezeNet, whose features training did see. Samples
are unpicked, from three seeds of latents: as drawn, and by rejection where the pair has whole-car probes."""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from _record import run_or_exit, save_and_print
from photo_pair import open_aligned

from carproto.app.pipeline import CarPipeline
from carproto.config import STYLE_INVERSION, InvertConfig
from carproto.core import sample_latents
from carproto.data.align import AlignConfig
from carproto.eval.features import extract_features, mobilenet_extractor
from carproto.eval.metrics import Evaluator
from carproto.eval.reconstruction import Lpips, explained_variance, foreground, mask_iou, retrieval
from carproto.images import to_bytes, to_tensor
from carproto.latent.encoder import reconstruct

SEEDS = (0, 1, 2)  # of the latents
SETS = ("data", "heldout", "concepts", "concepts_heldout")  # of photos: common and futuristic, seen and held out


def measure_samples(
    pipe: CarPipeline, kind: str, train: torch.Tensor, unseen: torch.Tensor, extractor, latents: dict
) -> dict:
    """Measure samples of one generator, mean and standard deviation over seeds: as drawn, and by rejection."""
    evaluator = Evaluator(unseen, extractor, train=train)
    names = ("kid", "precision", "recall", "density", "coverage", "copy_rate")
    n = len(latents["drawn"][0])
    result = {"n_train": len(train), "n_heldout": len(unseen), "n_samples": n, "seeds": list(SEEDS)}
    for how, by_seed in latents.items():
        images = [torch.cat([to_bytes(pipe.generator(kind)(part)) for part in z.split(50)]) for z in by_seed]
        rows = [evaluator.evaluate_images(one) for one in images]
        measured = {
            name: {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}
            for name, values in ((name, [row[name] for row in rows]) for name in names)
        }
        result |= measured if how == "drawn" else {how: measured}
    some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n]]
    real = evaluator.evaluate_images(to_tensor(some))
    result["training_photos"] = {name: real[name] for name in names if name != "copy_rate"}
    return result


def measure_inversions(images: torch.Tensor, x: torch.Tensor, extractor, lpips: Lpips, background: tuple) -> dict:
    """Compare inversions with their originals."""
    ranks = retrieval(extract_features(images, extractor), extract_features(x, extractor))
    masks = [foreground(some, background) for some in (images, x)]
    return {
        "retrieval_top1": ranks["top1"],
        "retrieval_top5": ranks["top5"],
        "chance": ranks["chance"],
        "photo_r2": explained_variance(images, x),
        "lpips": lpips(images, x).mean().item(),
        "mask_iou": mask_iou(*masks).mean().item(),
    }


def measure_inversion(pipe: CarPipeline, photos: torch.Tensor, extractor, arguments: argparse.Namespace) -> dict:
    """Measure inversions by the encoder alone, and refined ones."""
    x = to_tensor(photos)
    background = AlignConfig(aspect=arguments.aspect).background
    compared = {"x": x, "extractor": extractor, "lpips": Lpips(arguments.squeezenet), "background": background}
    by_encoder = torch.cat([reconstruct(pipe.encoder, pipe.common, part) for part in x.split(64)])
    result = {"n": len(x), "encoder": measure_inversions(by_encoder, **compared)}
    if arguments.steps:
        with torch.enable_grad():
            refined = pipe.encode(x, config=with_steps(pipe, arguments.steps), warn=False, quiet=False)
        result["refined"] = measure_inversions(refined.images, **compared)
        result |= {"steps": arguments.steps, "seconds_each": refined.seconds.mean().item()}
    return result


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """Make a parser with what a study of a released photo pair takes: the pair, its four sets, and how they open."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("release", help="name or folder of the pair")
    for name in (*SETS, "extractor"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--masks", type=Path, help="folder with a folder of masks for each set; default: beside it")
    parser.add_argument("--aspect", type=float, help="width by height of squashed photos; default: their own")
    parser.add_argument("--steps", type=int, default=STYLE_INVERSION.steps, help="of the refinement, in each pass")
    parser.add_argument("--out", type=Path, default=Path("data/records") / out)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser


def open_sets(arguments: argparse.Namespace, size: int) -> dict[str, torch.Tensor]:
    """Open the four sets as aligned cars of a size, uint8."""
    return {name: open_aligned(getattr(arguments, name), arguments, size).images for name in SETS}


def with_steps(pipe: CarPipeline, steps: int) -> InvertConfig:
    """Return a pipeline's inversion with another number of steps."""
    return replace(pipe.inversion, steps=steps)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = make_parser(__doc__.splitlines()[0], "photo_quality.json")
    parser.add_argument("--squeezenet", type=Path, required=True)
    parser.add_argument("--n_samples", type=int, default=1000, help="generated images a seed")
    parser.add_argument("--n_inverted", type=int, default=500, help="held-out photos that are inverted; 0 inverts none")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    pipe = CarPipeline.from_pretrained(arguments.release)
    extractor = mobilenet_extractor(arguments.extractor, 96)
    sets = open_sets(arguments, pipe.common.size)
    record = {"release": arguments.release, "fingerprints": pipe.fingerprints, "extractor": extractor.name}
    latents = {"drawn": [sample_latents(arguments.n_samples, pipe.common.z_dim, seed) for seed in SEEDS]}
    if pipe.whole_cars:
        latents["rejection"] = [pipe.sample(arguments.n_samples, seed) for seed in SEEDS]
        pairs = zip(*latents.values())
        record["accepted_at_once"] = statistics.fmean((a == b).all(1).float().mean().item() for a, b in pairs)
    options = {"extractor": extractor, "latents": latents}
    record["common"] = measure_samples(pipe, "common", sets["data"], sets["heldout"], **options)
    if pipe.futuristic is not None:
        record["futuristic"] = measure_samples(
            pipe, "futuristic", sets["concepts"], sets["concepts_heldout"], **options
        )
    if arguments.n_inverted:
        record["inversion"] = measure_inversion(pipe, sets["heldout"][: arguments.n_inverted], extractor, arguments)
    save_and_print(record, arguments.out)


if __name__ == "__main__":
    run_or_exit(main)
