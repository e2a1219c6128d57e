"""Train by our recipe and by that of 2022 until the held-out KID falls to 1.5; compare the training times on one core.

    python studies/time_to_quality.py train carproto --seed 0 OPTIONS
    python studies/time_to_quality.py train 2022 --seed 0 --every 250 OPTIONS
    python studies/time_to_quality.py time OPTIONS
    python studies/time_to_quality.py report

OPTIONS: --data COMMON.zip --heldout HELDOUT.zip --masks FOLDER --aspect 1.4 --extractor MOBILENET.safetensors
--feature_path SQUEEZENET.safetensors. Both recipes have the same networks, width and batch. Each run has a folder, may
be stopped at any moment, and goes on from its newest checkpoint; KID is that of images as the recipe generates them:
with EMA and standing statistics, or, for the recipe of 2022, with the newest weights and statistics of the batch.

A long run shares its core with other programs, so its own clock says little. `time` lets the recipes take turns and
counts the CPU seconds of a step; training time is steps times these seconds. All runs train with the engine that is
fastest, since the engine does not change the KID (parity.json). `time` also times the recipe of 2022 in plain fp32
without fused layers, as it was run then. `report` writes time_to_quality.jsonl, a line for each run, and
time_to_quality.json: seconds of a step, the times to the target, and their ratio in either engine."""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from _record import describe_command, run_or_exit, save_record
from feature_heads import time_turn
from photo_pair import CONFIG, open_aligned
from tqdm import tqdm
from training_recipe import RECIPES as PLAIN_RECIPES
from training_recipe import as_generated, measure, run_step, start_run

from carproto.config import CarprotoError, TrainConfig
from carproto.data.align import describe_frame
from carproto.eval.features import mobilenet_extractor
from carproto.eval.metrics import Evaluator
from carproto.files import atomic_path, load_json, lock_folder
from carproto.gan.checkpoints import log_session, open_run
from carproto.gan.session import check_extractor, check_images, finish_step
from carproto.gan.trainer import Trainer
from carproto.run import RunFolder, load_checkpoint, save_checkpoint

RECIPES = {"carproto": {}, "2022": PLAIN_RECIPES["2022"] | {"feature_net": None}}  # changes of the photo pair's recipe
N_FAKE, FEATURE_SIZE = 1000, 96  # generated images that are measured; pixels that MobileNetV2 sees
OF_A_RUN = ("seed", "steps", "report_every")  # options that runs of one recipe may differ in
PLAIN = "2022 in plain fp32"
ENGINES = {"the same engine": "2022", "plain fp32": PLAIN}  # of the recipe of 2022; ours always has our engine


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, help="what to do")
    parser.add_argument("recipe", nargs="?", choices=RECIPES, help="of a run")
    parser.add_argument("--data", type=Path, help="photos: folder or zip")
    parser.add_argument("--heldout", type=Path, help="held-out ones")
    parser.add_argument("--masks", type=Path, help="folder of the sets' masks; default: beside the set")
    parser.add_argument("--aspect", type=float, help="width by height of squashed photos; default: their own")
    parser.add_argument("--extractor", type=Path, help="MobileNetV2 weights, which measure")
    parser.add_argument("--feature_path", type=Path, help="SqueezeNet 1.1 weights, which train; default: torchvision's")
    parser.add_argument("--runs", type=Path, default=Path("runs/time_to_quality"), help="folder of all runs")
    parser.add_argument("--seed", type=int, default=0, help="of a run")
    parser.add_argument("--width", type=int, default=16, help="channels at full size")
    parser.add_argument("--steps", type=int, default=20_000, help="generator steps after which a run stops")
    parser.add_argument("--target", type=float, default=1.5, help="KID at which a run stops")
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each recipe that are timed")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    return parser.parse_args(argv)


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the photo pair's recipe at a width and seed."""
    changes = {"width": arguments.width, "seed": arguments.seed, "steps": arguments.steps}
    return replace(CONFIG, **changes, report_every=arguments.every)


def train_run(arguments: argparse.Namespace) -> None:
    """Train a recipe to the target, or go on with its run."""
    missing = [name for name in ("recipe", "data", "heldout", "extractor") if getattr(arguments, name) is None]
    if missing:
        raise CarprotoError(f"a run needs {', '.join(missing)}: see --help")
    cars, unseen = (open_aligned(path, arguments, CONFIG.size) for path in (arguments.data, arguments.heldout))
    extractor = mobilenet_extractor(arguments.extractor, FEATURE_SIZE)
    evaluator = Evaluator(unseen.images, extractor, train=cars.images, n_fake=N_FAKE)
    options = {"feature_path": arguments.feature_path}
    trainer, by_batch = start_run(RECIPES[arguments.recipe], read_config(arguments), cars.images, **options)
    check_extractor(trainer.config, extractor)
    run = RunFolder(arguments.runs / f"{arguments.recipe}_{arguments.seed}")
    data = {"n_images": len(cars.images), "data_hash": check_images(cars.images, trainer.config)}
    about = {
        "command": describe_command(),
        "recipe": arguments.recipe,
        "data": arguments.data.name,
        "heldout": arguments.heldout.name,
        "n_heldout": len(unseen.images),
        "frame": describe_frame(cars.align.config),
    }
    with lock_folder(run.path, work="training"):
        open_run(run, trainer.config, data, about, False, trainer.processes)
        state = load_checkpoint(run.checkpoints)
        if state is not None:
            trainer.load_state_dict(state)
        run.truncate_stats(trainer.step)
        log_session(trainer, run, [])
        train_to_target(trainer, run, by_batch, evaluator, arguments)


def train_to_target(
    trainer: Trainer, run: RunFolder, by_batch: bool, evaluator: Evaluator, arguments: argparse.Namespace
) -> None:
    """Train, measure and save until a KID is low enough, all steps are done, or a person stops it."""
    best = min((row["kid"] for row in run.stats() if "kid" in row), default=float("inf"))
    bar = tqdm(total=arguments.steps, initial=trainer.step, unit="step", desc=run.path.name)
    with bar, finish_step() as stop:
        while trainer.step < arguments.steps and best > arguments.target and not stop.is_set():
            run_step(trainer)
            bar.update()
            if trainer.step % arguments.every == 0 or trainer.step == arguments.steps:
                numbers = measure(as_generated(trainer, by_batch), evaluator)
                best = min(best, numbers.get("kid", best))
                run.log(step=trainer.step, **numbers)
                bar.write(f"step {trainer.step}: KID {numbers.get('kid', float('nan')):.3f}")
                save_checkpoint(run.checkpoints, trainer.step, trainer.state_dict())
        if stop.is_set():
            save_checkpoint(run.checkpoints, trainer.step, trainer.state_dict())


def time_recipes(arguments: argparse.Namespace, n_steps: int = 3) -> None:
    """Let the recipes take turns of a few steps each, LeCam acting, and write the seconds of a step in each round."""
    if arguments.data is None:
        raise CarprotoError("give --data, the photos of the runs")
    images = open_aligned(arguments.data, arguments, CONFIG.size).images
    config, trainers = replace(read_config(arguments), lecam_start=0), {}
    for name, recipe in {**RECIPES, PLAIN: RECIPES["2022"] | {"precision": "fp32"}}.items():
        trainers[name], _ = start_run(recipe, config, images, feature_path=arguments.feature_path)
    trainers[PLAIN].load_fused(dict.fromkeys(trainers[PLAIN].fused_layers, False))
    for trainer in trainers.values():
        time_turn(trainer, 1)  # the first step allocates
    turns = [{name: time_turn(one, n_steps) for name, one in trainers.items()} for _ in range(arguments.rounds)]
    engines = {
        name: {"precision": one.precision, "fused": sorted(layer for layer, is_on in one.fused_layers.items() if is_on)}
        for name, one in trainers.items()
    }
    results = {"width": config.width, "batch": config.batch, "n_steps": n_steps, "engines": engines, "rounds": turns}
    arguments.runs.mkdir(parents=True, exist_ok=True)
    save_record(results, arguments.runs / "seconds.json")
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in seconds_a_step(results).items()))


def seconds_a_step(timed: dict) -> dict[str, float]:
    """Return the median CPU seconds of a step of each recipe."""
    rounds = timed["rounds"]
    return {name: statistics.median(turn[name]["cpu"] for turn in rounds) for name in rounds[0]}


def describe_run(run: RunFolder) -> dict:
    """Return the record of a run."""
    sessions, config, data = run.stats("sessions.jsonl"), run.config(), run.data()
    return {
        **{name: data[name] for name in ("recipe", "command")},
        "seed": config["seed"],
        "commits": sorted({session["commit"] for session in sessions}),
        "precision": sessions[-1]["precision"],
        "fused": sessions[-1]["fused_layers"],
        "measured": run.stats(),
    }


def find_crossing(rows: list[dict], target: float) -> int | None:
    """Return the first measured step with a KID of at most the target, None where there is none."""
    return next((row["step"] for row in rows if row.get("kid", float("inf")) <= target), None)


def compare_times(runs: list[dict], seconds: dict[str, float], target: float) -> dict:
    """Return the times to the target, or to the end of the 2022 run, of the seed that this recipe trained longest."""
    by_seed = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {})[run["recipe"]] = run["measured"]
    pairs = [pair for pair in by_seed.values() if set(pair) == set(RECIPES) and find_crossing(pair["carproto"], target)]
    if not pairs:
        raise CarprotoError(f"no seed has runs of {' and '.join(RECIPES)}, ours at a KID of {target}: train on")
    pair = max(pairs, key=lambda pair: pair["2022"][-1]["step"])
    ours, theirs = (find_crossing(pair[recipe], target) for recipe in RECIPES)
    steps = {"carproto": ours, "2022": theirs or pair["2022"][-1]["step"]}
    times = {name: steps.get(name, steps["2022"]) * per_step for name, per_step in seconds.items()}
    return {
        "target": target,
        "steps": steps,
        "2022_reached_it": theirs is not None,
        "seconds": times,
        "ratio": {engine: times[name] / times["carproto"] for engine, name in ENGINES.items()},
    }


def write_report(arguments: argparse.Namespace) -> None:
    """Gather the runs and the seconds of a step in a record."""
    folders = sorted(path.parent for path in arguments.runs.glob("*/data.json"))
    runs = [describe_run(RunFolder(folder)) for folder in folders]
    if not runs:
        raise CarprotoError(f"{arguments.runs} holds no runs: train some, or name their folder (--runs)")
    timed = load_json(arguments.runs / "seconds.json")
    seconds = seconds_a_step(timed)
    configs = {run["recipe"]: RunFolder(folder).config() for run, folder in zip(runs, folders)}
    configs = {name: {key: one[key] for key in one if key not in OF_A_RUN} for name, one in configs.items()}
    data = {key: value for key, value in RunFolder(folders[0]).data().items() if key not in ("command", "recipe")}
    measured_by = {"extractor": f"MobileNetV2 at {FEATURE_SIZE} px", "n_fake": N_FAKE}
    result = compare_times(runs, seconds, arguments.target)
    record = {"configs": configs, **data, **measured_by, "seconds_a_step": seconds, **result, "timed": timed}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(arguments.out / "time_to_quality.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    save_record(record, arguments.out / "time_to_quality.json")
    relation = "" if result["2022_reached_it"] else "at least "
    print(", ".join(f"{engine}: {relation}{ratio:.1f} times" for engine, ratio in result["ratio"].items()))


TASKS = {"train": train_run, "time": time_recipes, "report": write_report}


def main(argv: list[str] | None = None) -> None:
    """Do a task."""
    arguments = read_arguments(argv)
    torch.set_num_threads(arguments.threads)
    run_or_exit(TASKS[arguments.task], arguments)


if __name__ == "__main__":
    main()
