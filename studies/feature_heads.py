"""Time training steps with and without the feature heads, in turns in one process, and write their ratio.

    python studies/feature_heads.py --squeezenet SQUEEZENET.safetensors

A step is what the trainer does for one generator step: `d_steps` steps of D and of the heads, and one of G. The ratio
is taken within a round of turns: once of the process's CPU seconds, which other programs hardly change, and once of
wall-clock seconds.
"""
import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from _record import run_or_exit, save_record

from carproto.config import TrainConfig
from carproto.gan.trainer import Trainer
from carproto.toycars.dataset import ToyCars


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--squeezenet", type=Path, required=True, help="safetensors of torchvision's SqueezeNet 1.1")
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 32], help="of G and D, default 24 32")
    parser.add_argument("--size", type=int, default=64, help="side of the images, default 64")
    parser.add_argument("--batch", type=int, default=32, help="images in a step, default 32")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="default bf16")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each, default 4")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn, default 3")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default 1")
    parser.add_argument("--out", type=Path, default=Path("data/records/feature_heads_step.json"), help="the record")
    return parser.parse_args(argv)


def time_turn(trainer: Trainer, n_steps: int) -> dict[str, float]:
    """Return the mean CPU and wall-clock seconds of some steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(n_steps):
        for _ in range(trainer.config.d_steps):
            trainer.step_discriminator()
        trainer.step_generator()
    return {"cpu": (time.process_time() - cpu) / n_steps, "wall": (time.perf_counter() - wall) / n_steps}


def compare(images: torch.Tensor, config: TrainConfig, feature_path: Path, n_rounds: int, n_steps: int) -> dict:
    """Time both trainers in turns; return seconds of each round and the ratios within rounds."""
    device = torch.device("cpu")
    trainers = {
        "without": Trainer(images, replace(config, feature_net=None), device),
        "with": Trainer(images, config, device, feature_path=feature_path),
    }
    for trainer in trainers.values():
        time_turn(trainer, 1)  # the first step allocates
    rounds = [{name: time_turn(trainer, n_steps) for name, trainer in trainers.items()} for _ in range(n_rounds)]
    result = {"width": config.width, "rounds": rounds}
    for clock in ("cpu", "wall"):
        ratios = [turn["with"][clock] / turn["without"][clock] for turn in rounds]
        seconds = {name: statistics.median(turn[name][clock] for turn in rounds) for name in trainers}
        low, high = min(ratios), max(ratios)
        result[clock] = {"seconds": seconds, "ratio": statistics.median(ratios), "low": low, "high": high}
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure, print and record."""
    arguments = read_arguments(argv)
    torch.set_num_threads(arguments.threads)
    images = ToyCars(4 * arguments.batch, arguments.size, seed=0).images
    shared = {name: getattr(arguments, name) for name in ("size", "batch", "precision")}
    config = TrainConfig(**shared, feature_net="squeezenet1_1")
    turns = {"n_rounds": arguments.rounds, "n_steps": arguments.steps}
    configs = [replace(config, width=width) for width in arguments.widths]
    results = [run_or_exit(compare, images, one, arguments.squeezenet, **turns) for one in configs]
    setting = {**shared, "d_steps": config.d_steps, "feature_net": config.feature_net}
    setting |= {"feature_size": config.feature_size, "seed": config.seed, "data": f"{len(images)} toy cars, seed 0"}
    save_record({**setting, **turns, "results": results}, arguments.out)
    for result in results:
        cpu, wall = result["cpu"]["ratio"], result["wall"]["ratio"]
        print(f"width {result['width']}: {cpu:.2f} times the CPU time, {wall:.2f} times the wall-clock time")


if __name__ == "__main__":
    main()
