"""Measure FreezeD at every depth, with and without DiffAugment and LeCam, over three seeds; can be stopped and goes on.

    python tools/study_freezed.py toys
    python tools/study_freezed.py photos --common COMMON.zip --concepts CONCEPTS.zip --heldout HELDOUT.zip --backbone MOBILENET.safetensors

The parent is trained once, then each cell is one fine-tuning run from it. One line per cell goes to data/records/freezed_NAME.jsonl.
"""
import argparse
import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from carproto.core import describe_environment, save_json
from carproto.dataset import CarImages, open_cars
from carproto.freezed import finetune_freezed
from carproto.metrics import Evaluator
from carproto.readers import feature_extractor
from carproto.train import train_gan
from carproto.trainer import TrainConfig

PARENT = TrainConfig(size=64, width=8, z_dim=64, steps=1500, batch=32, augment="", lecam_weight=0.0, ema_images=5000, report_every=1500)
CHILD = {"batch": 16, "d_steps": 2, "lr_g": 2e-4, "lr_d": 2e-4, "ema_images": 1000, "report_every": 1000}
DEPTHS, SEEDS = (0, 1, 2, 3, 4, 5), (0, 1, 2)


def open_sets(arguments: argparse.Namespace) -> tuple:
    """Return the parent's pictures, the child's, the child's held-out ones, and the extractor."""
    if arguments.name == "toys":
        common, concepts = open_cars("toycars", PARENT.size, split="train"), open_cars("toycars-futuristic", PARENT.size, split="train", n_toys=640)
        heldout = open_cars("toycars-futuristic", PARENT.size, split="heldout")
        return common.images, concepts.images, heldout.images, feature_extractor("toys")
    common = CarImages(arguments.common, PARENT.size)
    concepts, heldout = (without_renders(CarImages(path, PARENT.size)) for path in (arguments.concepts, arguments.heldout))
    return common.images, concepts, heldout, feature_extractor(arguments.backbone, size=96)


def without_renders(cars: CarImages) -> torch.Tensor:
    """Leave out game renders, whose one blue background is learned first."""
    return cars.images[[i for i, row in enumerate(cars.metadata) if row.get("kind") != "render"]]


def main() -> None:
    """Train the parent where it is missing, then fill in the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("toys", "photos"))
    for option in ("common", "concepts", "heldout", "backbone"):
        parser.add_argument(f"--{option}", default="", help="for photos: a zip, or a MobileNetV2 file")
    parser.add_argument("--steps", type=int, default=150, help="generator steps of a cell")
    parser.add_argument("--runs", type=Path, default=Path("runs/freezed_study"), help="where parents and cells are trained")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args()
    common, concepts, heldout, extractor = open_sets(arguments)
    record, parent_dir = arguments.out / f"freezed_{arguments.name}.jsonl", arguments.runs / arguments.name / "parent"
    arguments.out.mkdir(parents=True, exist_ok=True)
    parent = train_gan(common, parent_dir, PARENT)
    judge = Evaluator(heldout, extractor, train=concepts, n_fake=512)
    done = {tuple(row["cell"]) for row in map(json.loads, record.read_text().splitlines())} if record.exists() else set()
    about = {"command": f"python tools/study_freezed.py {arguments.name}", "steps": arguments.steps, "child": CHILD, "parent": asdict(PARENT),
             "n_train": len(concepts), "n_heldout": len(heldout), "before": judge.evaluate(parent.generator), "machine": describe_environment()}
    save_json(about, record.with_suffix(".json"))
    grid = itertools.product(SEEDS, DEPTHS, (True, False), (True, False))
    cells = [cell for cell in grid if cell not in done]
    with tqdm(cells, desc=f"FreezeD on {arguments.name}", unit="cell") as bar:
        for seed, depth, augment, lecam in bar:
            folder = arguments.runs / arguments.name / "cell"
            shutil.rmtree(folder, ignore_errors=True)
            child = finetune_freezed(
                parent_dir, concepts, folder, n_frozen=depth, steps=arguments.steps, seed=seed, lecam_weight=0.3 if lecam else 0.0,
                augment="color,translation,cutout" if augment else "", quiet=True, **CHILD,
            )  # fmt: skip
            numbers = judge.evaluate(child.generator)
            row = {k: numbers[k] for k in ("kid", "kid_sd", "frechet", "coverage", "precision", "copy_rate")}
            row = {"cell": [seed, depth, augment, lecam], **row, "seconds": child.run.stats()[-1]["seconds"]}
            with record.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            bar.set_postfix(depth=depth, kid=f"{row['kid']:.3f}")


if __name__ == "__main__":
    main()
