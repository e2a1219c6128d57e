"""Measure FreezeD at every depth, with and without DiffAugment and LeCam, over seeds; resumes when stopped.

    python studies/freezed.py toys --parent runs/toys
    python studies/freezed.py photos --parent runs/photos --concepts CONCEPTS.zip --heldout HELDOUT.zip \\
        --backbone MOBILENET.safetensors

The parent is a run of `carproto train`. A cell goes on from its newest checkpoint and takes the same steps as
`finetune_freezed`, but keeps neither reports nor checkpoints: what is measured is its averaged generator after the
last step. The seed changes last, so that a study which is stopped is whole for the seeds that it has.
data/records/freezed_NAME.jsonl gets a line per cell, freezed_NAME.json what all cells share."""

import argparse
import copy
import itertools
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _record import Study, run_or_report
from tqdm import tqdm

from carproto.config import CarprotoError, TrainConfig
from carproto.core import pick_device
from carproto.data.dataset import CarImages, open_cars
from carproto.eval.features import feature_extractor
from carproto.eval.metrics import Evaluator, generate_images
from carproto.gan.finetune import child_config
from carproto.gan.sngan import Generator, measure_statistics
from carproto.gan.trainer import Trainer
from carproto.run import RunFolder, load_checkpoint
from carproto.toycars.regressor import FactorRegressor, factor_regressor

CHILD = {"d_steps": 1, "lr_g": 5e-4, "lr_d": 1e-3, "ema_images": 1000}
POLICY, LECAM_WEIGHT = "color,translation,cutout", 0.3
# batches for BatchNorm's statistics: a run takes 32, which shifts the KID by less than the latents do and costs more
N_STATISTICS = 8
MEASURED = ("kid", "kid_sd", "kid_train", "frechet", "precision", "recall", "coverage", "copy_rate")


class StudyEvaluator:
    """Measures generators against held-out cars; toys are read for their futurism as well."""

    def __init__(
        self,
        heldout: torch.Tensor,
        train: torch.Tensor,
        extractor: object,
        n_fake: int,
        regressor: FactorRegressor | None,
    ):
        self.evaluator, self.regressor = Evaluator(heldout, extractor, train=train, n_fake=n_fake), regressor

    def measure(self, trainer: Trainer) -> dict:
        """Draw cars with the averaged generator and measure them."""
        G = measure_statistics(copy.deepcopy(trainer.G_ema), n_batches=N_STATISTICS)
        return self.measure_cars(generate_images(G, self.evaluator.n_fake, seed=self.evaluator.seed))

    def measure_cars(self, cars: torch.Tensor) -> dict:
        """Measure cars, generated or real."""
        numbers = self.evaluator.evaluate_images(cars)
        results = {name: numbers[name] for name in MEASURED}
        return results | (
            {"futurism": self.regressor.predict(cars)["futurism"].mean().item()} if self.regressor else {}
        )


def without_renders(cars: CarImages) -> torch.Tensor:
    """Leave out game renders, whose one blue background is learned first."""
    return cars.images[[i for i, row in enumerate(cars.metadata) if row.get("kind") != "render"]]


def open_sets(
    arguments: argparse.Namespace, size: int
) -> tuple[torch.Tensor, torch.Tensor, object, FactorRegressor | None]:
    """Return the concept cars to learn from, the held-out ones, the extractor, and who reads the futurism of toys."""
    if arguments.name == "toys":
        numbers = {"train": arguments.n_train, "heldout": arguments.n_heldout}
        concepts, heldout = (
            open_cars("toycars-futuristic", size, split=split, n_toys=n).images for split, n in numbers.items()
        )
        return concepts, heldout, feature_extractor("toys"), factor_regressor(quiet=True)
    concepts, heldout = (without_renders(CarImages(path, size)) for path in (arguments.concepts, arguments.heldout))
    return concepts, heldout, feature_extractor(arguments.backbone, size=96), None


def start_cell(parent: dict, config: TrainConfig, concepts: torch.Tensor) -> Trainer:
    """Make a trainer that goes on from the parent."""
    trainer = Trainer(concepts, config, pick_device())
    trainer.init_from_parent(copy.deepcopy(parent))  # Adam goes on in the tensors that it is given
    return trainer


def run_steps(trainer: Trainer, bar: tqdm) -> float:
    """Do all steps of a cell; return their seconds."""
    start = time.perf_counter()
    while trainer.step < trainer.config.steps:
        for _ in range(trainer.config.d_steps):
            trainer.step_discriminator()
        trainer.step_generator()
        bar.update()
    return time.perf_counter() - start


def do_cell(trainer: Trainer, evaluator: StudyEvaluator, bar: tqdm) -> dict:
    """Train and measure; a cell that ends in NaN tells its reason."""
    seconds, start = run_steps(trainer, bar), time.perf_counter()
    try:
        numbers = evaluator.measure(trainer)
    except CarprotoError as error:
        numbers = {"failed": str(error)}
    return {**numbers, "seconds": round(seconds, 2), "seconds_to_measure": round(time.perf_counter() - start, 2)}


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("toys", "photos"))
    parser.add_argument("--parent", type=Path, required=True, help="folder of the run to start from")
    for option, what in {
        "concepts": "zip of concept cars",
        "heldout": "zip of held-out ones",
        "backbone": "MobileNetV2 file",
    }.items():
        parser.add_argument(f"--{option}", help=f"for photos: {what}")
    parser.add_argument("--n_train", type=int, default=640, help="for toys: cars to learn from")
    parser.add_argument("--n_heldout", type=int, default=512, help="for toys: held-out cars")
    parser.add_argument("--n_fake", type=int, default=512, help="generated cars that are measured")
    parser.add_argument("--steps", type=int, default=100, help="generator steps of a cell")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs="+", help="numbers of frozen blocks; all without it")
    parser.add_argument("--full", action="store_true", help="only with DiffAugment and LeCam both, for a long run")
    parser.add_argument("--record", help="name of the record; freezed_toys or freezed_photos without it")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args(argv)
    if arguments.name == "photos" and not (arguments.concepts and arguments.heldout and arguments.backbone):
        parser.error("photos need --concepts, --heldout and --backbone")
    return arguments


def run_study(arguments: argparse.Namespace) -> Study:
    """Fill in the cells that are missing."""
    parent = load_checkpoint(arguments.parent / "checkpoints")
    if parent is None:
        raise CarprotoError(f"{arguments.parent} holds no trained run: give a folder with checkpoints in it")
    ancestor = TrainConfig(**RunFolder(arguments.parent).config())
    concepts, heldout, extractor, regressor = open_sets(arguments, ancestor.size)
    G = Generator(ancestor.size, ancestor.z_dim, ancestor.width)
    G.load_state_dict(parent["G_ema"])
    child = {**CHILD, "steps": arguments.steps, "batch": arguments.batch}
    config = {
        "parent": {"step": parent["step"], "fingerprint": G.fingerprint(), "config": asdict(ancestor)},
        "child": child,
        "policy": POLICY,
        "lecam_weight": LECAM_WEIGHT,
        "extractor": extractor.name,
        "n_train": len(concepts),
        "n_heldout": len(heldout),
        "n_fake": arguments.n_fake,
        "n_statistics": N_STATISTICS,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.out / f"{arguments.record or 'freezed_' + arguments.name}.jsonl", config)
    evaluator = StudyEvaluator(heldout, concepts, extractor, arguments.n_fake, regressor)

    def start(seed: int, depth: int, augment: bool, lecam: bool) -> Trainer:
        changes = {
            **child,
            "seed": seed,
            "augment": POLICY if augment else None,
            "lecam_weight": LECAM_WEIGHT if lecam else 0.0,
        }
        return start_cell(parent, child_config(ancestor, depth, changes), concepts)

    if not study.is_begun:
        first = start(arguments.seeds[0], 0, True, True)
        fused = sorted(name for name, is_fused in first.fused_layers.items() if is_fused)
        real = evaluator.measure_cars(concepts[: arguments.n_fake])
        real = {
            name: value for name, value in real.items() if name not in ("kid_train", "copy_rate")
        }  # these are the training cars
        study.begin(precision=first.precision, fused=fused, before=evaluator.measure(first), real=real)
    depths, with_or_without = (
        arguments.depths or range(ancestor.size.bit_length() - 1),
        (True,) if arguments.full else (True, False),
    )
    grid = itertools.product(arguments.seeds, depths, with_or_without, with_or_without)
    cells = [dict(zip(("seed", "depth", "augment", "lecam"), position)) for position in grid]
    cells = [cell for cell in cells if study.lacks(cell)]
    with tqdm(
        total=len(cells) * arguments.steps, desc=f"FreezeD on {arguments.name}", unit="step", dynamic_ncols=True
    ) as bar:
        for i, cell in enumerate(cells):
            bar.set_postfix(cell=f"{i + 1}/{len(cells)}", seed=cell["seed"], depth=cell["depth"])
            study.add({**cell, **do_cell(start(**cell), evaluator, bar)})
    return study


def main(argv: list[str] | None = None) -> None:
    """Study FreezeD."""
    run_or_report(run_study, read_arguments(argv), "cells")


if __name__ == "__main__":
    main()
