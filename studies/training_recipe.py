"""Train the 2022 recipe, ours, and ours with one change at a time, on the same photos for the same steps.

    python studies/training_recipe.py compare --data COMMON.zip --heldout HELDOUT.zip --backbone MOBILENET.safetensors
    python studies/training_recipe.py search --data COMMON.zip --heldout HELDOUT.zip \\
        --backbone MOBILENET.safetensors --seeds 0
    python studies/training_recipe.py heads --data COMMON.zip --heldout HELDOUT.zip --backbone MOBILENET.safetensors \\
        --feature_path SQUEEZENET.safetensors --aspect 1.4 --masks MASKS --steps 320 --n_measured 2
    python studies/training_recipe.py time --data COMMON.zip

`heads` takes the recipe of the photo pairs, whose discriminators are the SN-GAN's own and heads on SqueezeNet's
features, on aligned cars, and changes one thing at a time.
All runs have the same networks, batch size, generator steps and engine; what differs is in `RECIPES` and `CHANGES`.
Each is measured as its recipe would draw: the 2022 recipe has no average and normalises by the batch, ours draws with
the average and standing statistics. At the end the generator is measured without its average too, and at further
half-lives of the average, which one run can carry side by side. data/records/recipe_NAME.jsonl gets a line for each
run, recipe_NAME.json what all runs share, unless --record names another. `time` lets the recipes take turns, so that
all of them meet the same load, and writes the seconds of a step to recipe_time.json."""

import argparse
import copy
import itertools
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _record import Study, run_or_report, save_record
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from carproto.config import CarprotoError, TrainConfig
from carproto.core import pick_device
from carproto.data.align import AlignConfig
from carproto.data.dataset import CarImages
from carproto.data.masks import Aligner
from carproto.eval.features import feature_extractor
from carproto.eval.metrics import Evaluator
from carproto.gan.sngan import Generator, measure_statistics
from carproto.gan.trainer import Trainer

ALL = "color,translation,cutout"
OURS = {
    "lr_g": 5e-4,
    "lr_d": 1e-3,
    "d_steps": 2,
    "beta2": 0.99,
    "augment": "translation",
    "lecam_weight": 0.3,
    "ema_images": 10_000,
}
OLD = {"lr_g": 5e-4, "lr_d": 2e-4, "d_steps": 2, "beta2": 0.9, "augment": ALL, "lecam_weight": 0.3}
SEARCHED = OURS | {"d_steps": 1, "beta2": 0.9}
RECIPES = {
    "2022": OLD | {"flips": True, "by_batch": True},
    "carproto": OURS,
    "one D step": OURS | {"d_steps": 1},
    "without DiffAugment": OURS | {"augment": None},
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
PHOTO = {
    "lr_g": 2e-4,
    "lr_d": 1e-3,
    "lr_f": 4e-4,
    "beta2": 0.99,
    "augment": "translation,cutout",
    "lecam_weight": 0.0,
    "feature_net": "squeezenet1_1",
}
HEADS = {
    "photo pair": PHOTO,
    "without heads": PHOTO | {"feature_net": None},
    "heads weigh half": PHOTO | {"feature_weight": 0.5},
    "heads see 64 px": PHOTO | {"feature_size": 64},
    "without DiffAugment": PHOTO | {"augment": None},
    "all of DiffAugment": PHOTO | {"augment": ALL},
    "with LeCam": PHOTO | {"lecam_weight": 0.3},
    "lr doubled": PHOTO | {"lr_g": 4e-4, "lr_d": 2e-3, "lr_f": 8e-4},
    "batch halved": PHOTO | {"batch": 0.5},
    "latents of 64": PHOTO | {"z_dim": 64},
    "width 24": PHOTO | {"width": 24},
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


class EMAs:
    """Averages of the generator with other half-lives, beside the trainer's own."""

    def __init__(self, trainer: Trainer):
        self.selected = {images: copy.deepcopy(trainer.G_ema) for images in HALF_LIVES}
        self.trainer = trainer

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the generator, as the trainer's own average does."""
        for images, average in self.selected.items():
            decay = min(0.5 ** (self.trainer.config.batch / images), self.trainer.step / (10 + self.trainer.step))
            get_ema_multi_avg_fn(decay)(list(average.parameters()), list(self.trainer.G.parameters()), None)


def measure(G: nn.Module, evaluator: Evaluator) -> dict:
    """Measure a generator, or tell why it cannot be."""
    try:
        numbers = evaluator.evaluate(G)
    except CarprotoError as error:
        return {"failed": str(error)}
    return {name: numbers[name] for name in MEASURED}


def as_generated(trainer: Trainer, by_batch: bool) -> nn.Module:
    """Return the generator as its recipe draws with it."""
    return ByBatch(copy.deepcopy(trainer.G)) if by_batch else trainer.snapshot_ema()


def start_run(recipe: dict, config: TrainConfig, images: torch.Tensor, **options) -> tuple[Trainer, bool]:
    """Make the trainer of a recipe, with options of `Trainer`; tell as well whether it draws by the batch."""
    changes = dict(recipe)
    flips, by_batch = changes.pop("flips", False), changes.pop("by_batch", False)
    changes["batch"] = round(config.batch * changes.get("batch", 1))
    photos = torch.cat([images, images.flip(-1)]) if flips else images
    return Trainer(photos, replace(config, **changes), pick_device(), **options), by_batch


def run_step(trainer: Trainer) -> float:
    """Do one step of the recipe; return its seconds."""
    start = time.perf_counter()
    for _ in range(trainer.config.d_steps):
        trainer.step_discriminator()
    trainer.step_generator()
    return time.perf_counter() - start


def train_run(trainer: Trainer, points: list[int], by_batch: bool, evaluator: Evaluator, bar: tqdm) -> dict:
    """Train, and measure at some steps; the seconds are those of training."""
    seconds, measured, emas = 0.0, [], EMAs(trainer)
    for position in points:
        while trainer.step < position:
            seconds += run_step(trainer)
            emas.update()
            bar.update()
        measured.append(
            {"step": position, "seconds": round(seconds, 2), **measure(as_generated(trainer, by_batch), evaluator)}
        )
        bar.set_postfix(seed=trainer.config.seed, kid=f"{measured[-1].get('kid', float('nan')):.3f}")
    others = {"raw": trainer.G, **emas.selected}
    others = {str(name): measure(measure_statistics(copy.deepcopy(G)), evaluator) for name, G in others.items()}
    return {"measured": measured, "emas": others}


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name",
        choices=("compare", "search", "heads", "time"),
        help="the recipes, other settings of ours, those of the photo pairs, or seconds only",
    )
    for option, what in {
        "data": "zip or folder of photos",
        "heldout": "of held-out ones",
        "backbone": "MobileNetV2 file",
    }.items():
        parser.add_argument(f"--{option}", required=option == "data", default="", help=what)
    parser.add_argument("--feature_path", type=Path, help="SqueezeNet 1.1 file, for heads; default: torchvision's")
    parser.add_argument("--aspect", type=float, help="align the photos, which were squashed from this width by height")
    parser.add_argument("--masks", type=Path, help="folder with a folder of masks for each set; default: beside it")
    parser.add_argument("--steps", type=int, default=600, help="generator steps of a run")
    parser.add_argument("--n_measured", type=int, default=3, help="how often a run is measured, evenly spread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", help="some of them only")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="channels at full size")
    parser.add_argument("--z_dim", type=int, default=128, help="numbers of a latent")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--n_fake", type=int, default=1000, help="generated cars that are measured")
    parser.add_argument("--record", default="", help="name of the record; empty takes recipe_compare or recipe_search")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    return parser.parse_args(argv)


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return what all runs share."""
    return TrainConfig(
        size=arguments.size,
        width=arguments.width,
        z_dim=arguments.z_dim,
        batch=arguments.batch,
        steps=arguments.steps,
        lecam_start=arguments.steps // 6,
        report_every=arguments.steps,
    )


def open_photos(path: str, arguments: argparse.Namespace) -> torch.Tensor:
    """Open photos, aligned where an aspect is given."""
    if arguments.aspect is None:
        return CarImages(path, arguments.size).images
    masks = arguments.masks / Path(path).stem if arguments.masks else None
    return CarImages(path, arguments.size, align=Aligner(AlignConfig(aspect=arguments.aspect), masks=masks)).images


def time_recipes(arguments: argparse.Namespace, n_rounds: int = 8, n_steps: int = 5) -> None:
    """Let recipes take turns of a few steps each, LeCam acting, and write the mean seconds of a step in each round."""
    images = CarImages(arguments.data, arguments.size).images[:2000]
    config = replace(read_config(arguments), lecam_start=0)
    trainers = {
        name: start_run(RECIPES[name], config, images)[0]
        for name in arguments.recipes or ("2022", "carproto", "one D step")
    }
    seconds = {name: [] for name in trainers}
    for _ in tqdm(range(n_rounds + 1), desc="taking turns", unit="round"):
        for name, trainer in trainers.items():
            seconds[name].append(sum(run_step(trainer) for _ in range(n_steps)) / n_steps)
    results = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"config": asdict(config), "n_steps": n_steps, "seconds": results}
    save_record(record, arguments.out / f"{arguments.record or 'recipe_time'}.json")
    print(", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in results.items()))


def run_study(arguments: argparse.Namespace) -> Study:
    """Do the runs that are missing."""
    recipes = {"compare": RECIPES, "search": SEARCH, "heads": HEADS}[arguments.name]
    if not (arguments.heldout and arguments.backbone):
        raise CarprotoError("runs are measured: give --heldout and --backbone")
    unknown = set(arguments.recipes or ()) - set(recipes)
    if unknown:
        raise CarprotoError(f"{', '.join(sorted(unknown))}: no such recipe, choose of {', '.join(recipes)}")
    config = read_config(arguments)
    n_places = min(arguments.n_measured, arguments.steps)
    points = [round(arguments.steps * (i + 1) / n_places) for i in range(n_places)]
    images, heldout = (open_photos(path, arguments) for path in (arguments.data, arguments.heldout))
    evaluator = Evaluator(
        heldout, feature_extractor(arguments.backbone, size=96), train=images, n_fake=arguments.n_fake
    )
    varied = {*itertools.chain.from_iterable(recipes.values()), "seed", "flips", "by_batch"}
    shared = {name: value for name, value in asdict(config).items() if name not in varied or name == "batch"}
    settings = {
        "config": shared,
        "measured_at": points,
        "extractor": evaluator.extractor.name,
        "n_train": len(images),
        "n_heldout": len(heldout),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.record or 'recipe_' + arguments.name}.jsonl"
    study = Study(path, settings | {"n_fake": arguments.n_fake, "recipes": recipes})
    if not study.is_begun:
        study.begin()
    runs = [{"seed": seed, "recipe": name} for seed in arguments.seeds for name in arguments.recipes or recipes]
    runs = [run for run in runs if study.lacks(run)]
    with tqdm(total=len(runs) * arguments.steps, unit="step", dynamic_ncols=True) as bar:
        for i, run in enumerate(runs):
            bar.set_description(f"{run['recipe']}, run {i + 1} of {len(runs)}")
            recipe, seeded_config = recipes[run["recipe"]], replace(config, seed=run["seed"])
            trainer, by_batch = start_run(recipe, seeded_config, images, feature_path=arguments.feature_path)
            fused = sorted(name for name, is_fused in trainer.fused_layers.items() if is_fused)
            study.add(
                {
                    **run,
                    "precision": trainer.precision,
                    "fused": fused,
                    **train_run(trainer, points, by_batch, evaluator, bar),
                }
            )
    return study


def main(argv: list[str] | None = None) -> None:
    """Compare recipes."""
    arguments = read_arguments(argv)
    if arguments.name == "time":
        time_recipes(arguments)
    else:
        run_or_report(run_study, arguments, "runs")


if __name__ == "__main__":
    main()
