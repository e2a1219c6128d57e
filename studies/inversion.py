"""Measure inversion: encoders of several seeds, refinement compared with alternatives, and reconstruction of samples.

    python studies/inversion.py toys   --common runs/common --encoders runs/encoder0 runs/encoder1 runs/encoder2
    python studies/inversion.py photos --common runs/common --encoders runs/encoder0 ... --heldout HELDOUT.zip \\
        --squeezenet SQUEEZENET.safetensors

One record goes to data/records/invert_NAME.json. Refinement minimizes the distance in the features of the run's
discriminator; SqueezeNet, where given, is a second metric that took no part in it.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from _record import save_record

from carproto.config import CarprotoError, InvertConfig
from carproto.core import sample_latents
from carproto.data.dataset import open_cars
from carproto.eval.metrics import psnr
from carproto.eval.perceptual import PerceptualDistance, discriminator_features, squeezenet_features
from carproto.files import load_json
from carproto.gan.train import best_generator, load_discriminator
from carproto.images import to_tensor
from carproto.latent.encoder import load_encoder
from carproto.latent.invert import Inversion, invert
from carproto.latent.train_encoder import evaluate_encoder

PHOTOS = ("photo_r2", "photo_distance", "photo_rms", "photo_rms_99", "n_photos", "steps", "seconds")


def spread(values: list[float]) -> dict:
    """Return mean, standard deviation and the values."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def evaluate_all(runs: list[Path], generators: dict) -> dict:
    """Evaluate encoders that differ in their seeds only, on held-out latents of each generator."""
    text = [load_json(run / "encoder" / "config.json") for run in runs]
    configs = [load_json(run / "config.json") for run in runs]
    if any({**config, "seed": 0} != {**configs[0], "seed": 0} for config in configs):
        raise CarprotoError("the encoders differ in more than their seeds: they are no repetitions of each other")
    bound = generators["common"].fingerprint()
    results = {"config": configs[0], "seeds": [config["seed"] for config in configs]}
    for kind, G in generators.items():
        scores = [evaluate_encoder(load_encoder(run / "encoder", fingerprint=bound, device="cpu"), [G]) for run in runs]
        results[kind] = {
            name: spread([row[name] for row in scores]) for name in ("r2", "r2_low", "r2_high", "image_r2")
        }
        results[kind]["r2_each"] = [row["r2_each"] for row in scores]
    return {**results, **{name: spread([row[name] for row in text]) for name in PHOTOS if name in text[0]}}


def measure_inversion(results: Inversion, targets: torch.Tensor, perceptual: dict[str, PerceptualDistance]) -> dict:
    """Measure an inversion with all perceptual metrics, before and after refinement."""
    numbers = {
        "psnr": psnr(results.images, targets).mean().item(),
        "psnr_start": psnr(results.images_start, targets).mean().item(),
    }
    with torch.no_grad():
        for name, metric in perceptual.items():
            pairs = list(zip(targets.split(32), results.images.split(32), results.images_start.split(32)))
            numbers[f"distance_{name}"] = torch.cat([metric(x, y) for x, y, _ in pairs]).mean().item()
            numbers[f"distance_{name}_start"] = torch.cat([metric(x, y) for x, _, y in pairs]).mean().item()
    return {**numbers, "seconds": results.seconds.mean().item()}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("toys", "photos"))
    parser.add_argument("--common", type=Path, required=True, help="the common cars' run")
    parser.add_argument("--futuristic", type=Path, help="the futuristic cars' run, whose latents are evaluated too")
    parser.add_argument(
        "--encoders",
        type=Path,
        nargs="+",
        required=True,
        help="encoder runs that differ in their seeds; the first one is used",
    )
    parser.add_argument("--heldout", default="toycars", help="photos never trained on")
    parser.add_argument("--squeezenet", default="", help="a file with SqueezeNet 1.1 features, as a second metric")
    parser.add_argument("--n", type=int, default=128, help="cars")
    parser.add_argument("--steps", type=int, default=100, help="refinement steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generators = {
        kind: best_generator(run, "cpu")
        for kind, run in vars(arguments).items()
        if kind in ("common", "futuristic") and run
    }
    G = generators["common"]
    E = load_encoder(arguments.encoders[0] / "encoder", fingerprint=G.fingerprint(), device="cpu")
    heldout = open_cars(arguments.heldout, G.size, split="heldout" if arguments.heldout == "toycars" else None).images
    x = to_tensor(heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))[: arguments.n]])
    with torch.no_grad():
        samples = torch.cat([G(z) for z in sample_latents(arguments.n, G.z_dim, seed=2_000_003).split(32)])
    perceptual = {
        "discriminator": PerceptualDistance(discriminator_features(load_discriminator(arguments.common, "cpu")))
    }
    if arguments.squeezenet:
        perceptual["squeezenet"] = PerceptualDistance(squeezenet_features(arguments.squeezenet))
    metric, settings = perceptual["discriminator"], InvertConfig(steps=arguments.steps, batch=16)
    refined, chance = (invert(x, G, start, perceptual=metric, config=settings) for start in (E, None))
    gained, gained_chance = (
        invert(x, G, start, perceptual=metric, config=replace(settings, use_channel_gains=True)) for start in (E, None)
    )
    zeros = invert(x, G, perceptual=metric, z_start=torch.zeros(len(x), G.z_dim), config=InvertConfig(steps=0))
    again = invert(samples, G, E, perceptual=metric, config=settings)
    quality = psnr(again.images, samples)
    record = {
        "generator": {**G.config(), "fingerprint": G.fingerprint()},
        "invert": {
            "steps": arguments.steps,
            "batch": settings.batch,
            "lr": settings.lr,
            "n": len(x),
            "seed": 0,
            "n_channel_gains": G.n_channel_gains,
        },
        "encoder": evaluate_all(arguments.encoders, generators),
        "heldout": {
            "refined from the encoder": measure_inversion(refined, x, perceptual),
            "refined from chance": measure_inversion(chance, x, perceptual),
            "refined with channel gains from the encoder": measure_inversion(gained, x, perceptual),
            "refined with channel gains from chance": measure_inversion(gained_chance, x, perceptual),
            "always zero (the 2022 baseline)": measure_inversion(zeros, x, perceptual),
        },
        "reconstruction_of_samples": {
            **measure_inversion(again, samples, perceptual),
            "share_30_db": (quality >= 30).float().mean().item(),
            "psnr_median": quality.median().item(),
        },
    }
    save_record(record, arguments.out / f"invert_{arguments.name}.json")
    after, before = (
        record["heldout"]["refined from the encoder"][f"distance_discriminator{end}"] for end in ("", "_start")
    )
    by_chance = record["heldout"]["refined from chance"]["distance_discriminator"]
    share_30_db = record["reconstruction_of_samples"]["share_30_db"]
    print(
        f"R2 {record['encoder']['common']['r2']['mean']:.3f}; distance {before:.3f} encoded, {after:.3f} refined "
        f"({after / before - 1:+.0%}), "
        f"{by_chance:.3f} from chance ({after / by_chance - 1:+.0%}); {share_30_db:.0%} of samples at 30 dB; "
        f"{refined.seconds.mean():.2f} s an image"
    )


if __name__ == "__main__":
    main()
