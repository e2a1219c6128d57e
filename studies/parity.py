"""Train toy cars twice for each seed, in plain fp32 and as carproto trains; compare the KID at equal steps.

    python studies/parity.py --steps 900

`plain` computes in fp32 and with every layer in its plain form. `ours` takes the precision that the hardware computes
fastest, and the form that was measured to be faster for each layer; where no `ConvPool` was, as in small networks,
all of them take their one-piece form all the same, so that the claim is tested. Both start from the same weights and
see the same cars in the same order. The forms swap places from seed to seed, so that a busy machine slows both.
data/records/parity.jsonl gets a line for each run, parity.json what all runs share."""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _record import Study, run_or_report
from tqdm import tqdm

from carproto.config import CarprotoError, TrainConfig
from carproto.core import pick_device
from carproto.data.dataset import open_cars
from carproto.eval.metrics import Evaluator
from carproto.gan.fused_conv import ConvPool
from carproto.gan.trainer import Trainer

VARIANTS = ("plain", "ours")
MEASURED = ("kid", "kid_sd", "frechet", "precision", "recall", "coverage", "copy_rate")


def make_trainer(images: torch.Tensor, config: TrainConfig, variant: str, ours: str) -> Trainer:
    """Make a trainer whose layers and numbers are plain, or ours."""
    trainer = Trainer(images, replace(config, precision="fp32" if variant == "plain" else ours), pick_device())
    if variant == "plain":
        trainer.load_fused(dict.fromkeys(trainer.fused_layers, False))
    elif not any(trainer.fused_layers[name] for name in pooling_layers(trainer)):
        trainer.load_fused(trainer.fused_layers | dict.fromkeys(pooling_layers(trainer), True))
    return trainer


def pooling_layers(trainer: Trainer) -> list[str]:
    """Name the discriminator's layers that convolve and pool."""
    return [f"D.{name}" for name, layer in trainer.D.named_modules() if isinstance(layer, ConvPool)]


def train_run(trainer: Trainer, points: list[int], evaluator: Evaluator, bar: tqdm) -> dict:
    """Train, and measure at some steps; the seconds are those of training."""
    seconds, measured = 0.0, []
    for position in points:
        start = time.perf_counter()
        while trainer.step < position:
            for _ in range(trainer.config.d_steps):
                trainer.step_discriminator()
            trainer.step_generator()
            bar.update()
        seconds += time.perf_counter() - start
        try:
            numbers = evaluator.evaluate(trainer.snapshot_ema())
        except CarprotoError as error:
            return {"measured": measured, "failed": f"at step {position}: {error}"}
        measured.append({"step": position, "seconds": round(seconds, 2), **{name: numbers[name] for name in MEASURED}})
        bar.set_postfix(seed=trainer.config.seed, kid=f"{numbers['kid']:.3f}")
    return {"measured": measured}


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900, help="generator steps of a run")
    parser.add_argument("--n_measured", type=int, default=3, help="how often a run is measured, evenly spread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="channels at full size")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of ours")
    parser.add_argument("--n_train", type=int, default=4096, help="toy cars to learn from")
    parser.add_argument(
        "--n_heldout", type=int, default=512, help="held-out toy cars, and generated cars that are measured"
    )
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    return parser.parse_args(argv)


def run_study(arguments: argparse.Namespace) -> Study:
    """Do the runs that are missing."""
    config = TrainConfig(
        size=arguments.size,
        width=arguments.width,
        z_dim=64,
        batch=arguments.batch,
        steps=arguments.steps,
        lecam_start=arguments.steps // 5,
        report_every=arguments.steps,
    )
    n_places = min(arguments.n_measured, arguments.steps)
    points = [round(arguments.steps * (i + 1) / n_places) for i in range(n_places)]
    numbers = {"train": arguments.n_train, "heldout": arguments.n_heldout}
    images, heldout = (
        open_cars("toycars", arguments.size, split=split, n_toys=n).images for split, n in numbers.items()
    )
    evaluator = Evaluator(heldout, "toys", train=images)
    shared = {name: value for name, value in asdict(config).items() if name not in ("seed", "precision")}
    settings = {
        "config": shared,
        "precision_of_ours": arguments.precision,
        "measured_at": points,
        "extractor": evaluator.extractor.name,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.out / "parity.jsonl", settings | {"n_train": len(images), "n_heldout": len(heldout)})
    if not study.is_begun:
        study.begin()
    runs = [
        {"seed": seed, "variant": variant}
        for i, seed in enumerate(arguments.seeds)
        for variant in VARIANTS[:: -1 if i % 2 else 1]
    ]
    runs = [run for run in runs if study.lacks(run)]
    with tqdm(total=len(runs) * arguments.steps, unit="step", dynamic_ncols=True) as bar:
        for i, run in enumerate(runs):
            bar.set_description(f"{run['variant']}, run {i + 1} of {len(runs)}")
            trainer = make_trainer(images, replace(config, seed=run["seed"]), run["variant"], arguments.precision)
            fused = sorted(name for name, is_fused in trainer.fused_layers.items() if is_fused)
            about = {
                "precision": trainer.precision,
                "n_layers": len(trainer.fused_layers),
                "n_fused": len(fused),
                "fused": fused,
            }
            study.add({**run, **about, **train_run(trainer, points, evaluator, bar)})
    return study


def main(argv: list[str] | None = None) -> None:
    """Compare forms."""
    run_or_report(run_study, read_arguments(argv), "runs")


if __name__ == "__main__":
    main()
