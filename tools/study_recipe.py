"""Train the 2022 recipe, ours, and ours with one change at a time, on the same photos for the same steps; can be stopped and goes on.

    python tools/study_recipe.py compare --data COMMON.zip --heldout HELDOUT.zip --backbone MOBILENET.safetensors
    python tools/study_recipe.py search --data COMMON.zip --heldout HELDOUT.zip --backbone MOBILENET.safetensors --seeds 0

All runs have the same networks, batch size, generator steps and engine; what differs is in `RECIPES` and `CHANGES`. Each is measured as its
recipe would draw: the 2022 recipe has no average and normalises by the batch, ours draws with the average and standing statistics. At the end
the generator is measured without its average too, and at further half-lives of the average, which one run can carry side by side.
data/records/recipe_NAME.jsonl gets a line for each run, recipe_NAME.json what all runs share, unless --record names another.
"""
import argparse
import copy
import itertools
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from study_freezed import Study, run_or_tell
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from carproto.core import CarprotoError, pick_device
from carproto.dataset import CarImages
from carproto.metrics import Evaluator
from carproto.readers import feature_extractor
from carproto.sngan import Generator, measure_statistics
from carproto.trainer import TrainConfig, Trainer

ALL = "color,translation,cutout"
OURS = {"lr_g": 5e-4, "lr_d": 1e-3, "d_steps": 2, "beta2": 0.99, "augment": "translation", "lecam_weight": 0.3, "ema_images": 10_000}
OLD = {"lr_g": 5e-4, "lr_d": 2e-4, "d_steps": 2, "beta2": 0.9, "augment": ALL, "lecam_weight": 0.3}
SEARCHED = OURS | {"d_steps": 1, "beta2": 0.9}
RECIPES = {
    "2022": OLD | {"flips": True, "by_batch": True},
    "carproto": OURS,
    "one D step": OURS | {"d_steps": 1},
    "without DiffAugment": OURS | {"augment": ""},
    "without LeCam": OURS | {"lecam_weight": 0.0},
    "with flips": OURS | {"flips": True},
}
CHANGES = {
    "all of DiffAugment": {"augment": ALL},
    "lr halved": {"lr_g": 2.5e-4, "lr_d": 5e-4},
    "lr doubled": {"lr_g": 1e-3, "lr_d": 2e-3},
    "equal lr": {"lr_d": 5e-4},
    "beta2 0.99": {"beta2": 0.99},
    "two D steps": {"d_steps": 2},
    "two D steps, equal lr": {"d_steps": 2, "lr_d": 5e-4},
    "two D steps, lr halved": {"d_steps": 2, "lr_g": 2.5e-4, "lr_d": 5e-4},
    "two D steps, beta2 0.99": {"d_steps": 2, "beta2": 0.99},
    "LeCam 1": {"lecam_weight": 1.0},
    "batch halved": {"batch": 0.5},
}
SEARCH = {name: SEARCHED | change for name, change in CHANGES.items()}
HALF_LIVES = (1_000, 3_000, 30_000)  # of further averages, images; each run is measured at its own as well
MEASURED = ("kid", "kid_sd", "kid_train", "frechet", "precision", "recall", "coverage", "copy_rate")


class ByBatch(nn.Module):
    """Normalises by the batch that it draws, as a generator without standing statistics does."""

    def __init__(self, G: Generator):
        super().__init__()
        self.G, self.z_dim = G, G.z_dim

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Draw in training mode."""
        return self.G.train()(z)


class Averages:
    """Averages of the generator with other half-lives, beside the trainer's own."""

    def __init__(self, trainer: Trainer):
        self.kept = {images: copy.deepcopy(trainer.ema) for images in HALF_LIVES}
        self.trainer = trainer

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the generator, as the trainer's own average does."""
        for images, average in self.kept.items():
            decay = min(0.5 ** (self.trainer.config.batch / images), self.trainer.step / (10 + self.trainer.step))
            get_ema_multi_avg_fn(decay)(list(average.parameters()), list(self.trainer.G.parameters()), None)


def measure(G: nn.Module, judge: Evaluator) -> dict:
    """Measure a generator, or tell why it cannot be."""
    try:
        numbers = judge.evaluate(G)
    except CarprotoError as error:
        return {"failed": str(error)}
    return {name: numbers[name] for name in MEASURED}


def as_drawn(trainer: Trainer, by_batch: bool) -> nn.Module:
    """Return the generator as its recipe draws with it."""
    return ByBatch(copy.deepcopy(trainer.G)) if by_batch else trainer.drawing_generator()


def train_run(trainer: Trainer, places: list[int], by_batch: bool, judge: Evaluator, bar: tqdm) -> dict:
    """Train, and measure at some steps; the seconds are those of training."""
    seconds, measured, averages = 0.0, [], Averages(trainer)
    for place in places:
        while trainer.step < place:
            start = time.perf_counter()
            for _ in range(trainer.config.d_steps):
                trainer.step_discriminator()
            trainer.step_generator()
            seconds += time.perf_counter() - start
            averages.update()
            bar.update()
        measured.append({"step": place, "seconds": round(seconds, 2), **measure(as_drawn(trainer, by_batch), judge)})
        bar.set_postfix(seed=trainer.config.seed, kid=f"{measured[-1].get('kid', float('nan')):.3f}")
    others = {"raw": trainer.G, **averages.kept}
    others = {str(name): measure(measure_statistics(copy.deepcopy(G)), judge) for name, G in others.items()}
    return {"measured": measured, "averages": others}


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("compare", "search"), help="the recipes and what each part is worth, or other settings of ours")
    for option, what in {"data": "zip or folder of photos", "heldout": "of held-out ones", "backbone": "MobileNetV2 file"}.items():
        parser.add_argument(f"--{option}", required=True, help=what)
    parser.add_argument("--steps", type=int, default=600, help="generator steps of a run")
    parser.add_argument("--n_measured", type=int, default=3, help="how often a run is measured, evenly spread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", help="some of them only")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="channels at full size")
    parser.add_argument("--z_dim", type=int, default=128, help="numbers of a code")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--n_fake", type=int, default=1000, help="cars that are drawn to be measured")
    parser.add_argument("--record", default="", help="name of the record; empty takes recipe_compare or recipe_search")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    return parser.parse_args(argv)


def run_study(arguments: argparse.Namespace) -> Study:
    """Do the runs that are missing."""
    recipes = RECIPES if arguments.name == "compare" else SEARCH
    unknown = set(arguments.recipes or ()) - set(recipes)
    if unknown:
        raise CarprotoError(f"{', '.join(sorted(unknown))}: no such recipe, choose of {', '.join(recipes)}")
    config = TrainConfig(
        size=arguments.size, width=arguments.width, z_dim=arguments.z_dim, batch=arguments.batch, steps=arguments.steps,
        lecam_start=arguments.steps // 6, report_every=arguments.steps,
    )  # fmt: skip
    n_places = min(arguments.n_measured, arguments.steps)
    places = [round(arguments.steps * (i + 1) / n_places) for i in range(n_places)]
    images, heldout = (CarImages(path, arguments.size).images for path in (arguments.data, arguments.heldout))
    judge = Evaluator(heldout, feature_extractor(arguments.backbone, size=96), train=images, n_fake=arguments.n_fake)
    varied = {*itertools.chain.from_iterable(recipes.values()), "seed", "flips", "by_batch"}
    shared = {name: value for name, value in asdict(config).items() if name not in varied or name == "batch"}
    choices = {"config": shared, "measured_at": places, "extractor": judge.extractor.name, "n_train": len(images), "n_heldout": len(heldout)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.record or 'recipe_' + arguments.name}.jsonl"
    study = Study(path, choices | {"n_fake": arguments.n_fake, "recipes": recipes})
    if not study.is_begun:
        study.begin()
    runs = [{"seed": seed, "recipe": name} for seed in arguments.seeds for name in arguments.recipes or recipes]
    runs = [run for run in runs if study.lacks(run)]
    with tqdm(total=len(runs) * arguments.steps, unit="step", dynamic_ncols=True) as bar:
        for i, run in enumerate(runs):
            bar.set_description(f"{run['recipe']}, run {i + 1} of {len(runs)}")
            changes = dict(recipes[run["recipe"]])
            flips, by_batch = changes.pop("flips", False), changes.pop("by_batch", False)
            changes["batch"] = round(arguments.batch * changes.get("batch", 1))
            photos = torch.cat([images, images.flip(-1)]) if flips else images
            trainer = Trainer(photos, replace(config, seed=run["seed"], **changes), pick_device())
            fused = sorted(name for name, is_fused in trainer.forms.items() if is_fused)
            study.add({**run, "precision": trainer.precision, "fused": fused, **train_run(trainer, places, by_batch, judge, bar)})
    return study


def main(argv: list[str] | None = None) -> None:
    """Compare recipes."""
    run_or_tell(run_study, read_arguments(argv), "runs")


if __name__ == "__main__":
    main()
