"""Kill a small demo at moments over its whole duration, resume it, and compare its end with an unbroken demo's.

    python studies/demo_kills.py          # writes data/records/demo_kills.json
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _record import save_record
from safetensors.torch import load_file

from carproto.app import demo
from carproto.config import DemoPlan
from carproto.files import load_json
from carproto.run import RunFolder, list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["render_cars", "train_models", "invert_and_blend", "measure", "make_figures", "write_page"]
TIMES = {"seconds", "waiting", "saving"}  # what two equal runs may differ in
PLAN = DemoPlan(
    size=16,
    width=4,
    z_dim=8,
    z_subspace=4,
    n_common=64,
    n_futuristic=40,
    n_heldout=32,
    gan_steps=20,
    finetune_steps=10,
    encoder_steps=10,
    invert_steps=2,
    n_pairs=2,
)


def start_demo(folder: Path) -> int:
    """Fork a process that runs the demo and appends each stage's name to FOLDER.stages; return the process."""
    stages = folder.with_suffix(".stages")
    stages.write_text("")
    child = os.fork()
    if child:
        return child

    def announce(name: str, stage: Callable) -> Callable:
        def announced(*args, **options):
            with open(stages, "a") as lines:
                lines.write(f"{name}\n")
            return stage(*args, **options)

        return announced

    status = 1
    try:
        for name in STAGES:
            setattr(demo, name, announce(name, getattr(demo, name)))
        demo.run_demo(folder, PLAN, quiet=True)
        status = 0
    finally:
        os._exit(status)


def read_progress(folder: Path) -> tuple[int, int]:
    """Return the number of stages that this session has begun, and the steps that all runs have logged."""
    steps = 0
    for path in folder.glob("*/stats.jsonl"):
        if path.parent.name != "subspace":  # a copy
            steps += path.read_bytes().count(b"\n")
    return len(folder.with_suffix(".stages").read_text().split()), steps


def cpu_seconds(process: int) -> float | None:
    """Return the CPU time of a process, or None when it has ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def time_demo(folder: Path) -> tuple[list[tuple], float]:
    """Run an unbroken demo; return each progress with the CPU time at which it was reached, and the whole CPU time."""
    process, marks, now = start_demo(folder), [], 0.0
    while (seconds := cpu_seconds(process)) is not None:
        now = seconds
        progress = read_progress(folder)
        if not marks or progress > marks[-1][0]:
            marks.append((progress, now))
        time.sleep(0.005)
    if os.waitpid(process, 0)[1]:
        sys.exit("demo_kills: the unbroken demo failed, see above")
    return marks, now


def kill_demo(folder: Path, progress: tuple[int, int], more: float) -> bool:
    """Resume the demo and kill it `more` CPU seconds after it reached `progress`; return whether it still worked."""
    process, reached = start_demo(folder), None
    while (now := cpu_seconds(process)) is not None:
        if reached is None and read_progress(folder) >= progress:
            reached = now
        if reached is not None and now - reached >= more:
            break
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"demo_kills: a resumed demo failed with status {status}, see above")
    return status == -signal.SIGKILL


def without_times(value: object) -> object:
    """Drop every entry that is a time."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def is_same(a: object, b: object) -> bool:
    """Compare nested dicts and lists of tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def read_state(folder: Path) -> dict:
    """Return what a demo leaves: weights, training states, statistics, numbers, figures and report, by name."""
    state = {str(path.relative_to(folder)): load_file(path) for path in folder.glob("*/*/model.safetensors")}
    for path in folder.glob("*/checkpoints"):
        newest = torch.load(list_checkpoints(path)[-1], weights_only=True)
        state[str(path.relative_to(folder))] = without_times(newest)
    for path in folder.glob("*/stats.jsonl"):
        state[str(path.relative_to(folder))] = without_times(RunFolder(path.parent).stats())
    for path in [*folder.glob("pictures/*"), *folder.glob("*/samples/*"), folder / "report.html"]:
        state[str(path.relative_to(folder))] = path.read_bytes()
    state["numbers.json"] = without_times(load_json(folder / "numbers.json"))
    state["leftovers"] = sorted(path.name for path in folder.rglob("*.tmp"))
    return state


def main() -> None:
    """Time one demo, kill another, compare them, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many times the demo is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "records" / "demo_kills.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dice, kills = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        marks, seconds = time_demo(whole)
        while len(kills) < args.kills:
            moment = seconds * (len(kills) + dice.random()) / args.kills
            passed = [mark for mark in marks if mark[1] <= moment]
            progress, reached = max(passed, key=lambda mark: mark[1], default=((0, 0), 0.0))
            if kill_demo(killed, progress, moment - reached):
                stages, rows = read_progress(killed)
                stage = STAGES[stages - 1] if stages else "start"
                kills.append({"share": round(moment / seconds, 3), "stage": stage, "rows": rows})
                print(json.dumps(kills[-1]), flush=True)
        if os.waitstatus_to_exitcode(os.waitpid(start_demo(killed), 0)[1]):
            sys.exit("demo_kills: the last demo failed, see above")
        states = read_state(killed), read_state(whole)
    names = sorted(states[0].keys() | states[1].keys())
    different = [name for name in names if not is_same(states[0].get(name), states[1].get(name))]
    save_record({"cpu_seconds": seconds, "kills": kills, "compared": names, "different": different}, args.out)
    print(f"{len(kills)} kills, {len(names) - len(different)} of {len(names)} parts are equal; {args.out}")
    if different:
        sys.exit(f"demo_kills: these differ: {', '.join(different)}")


if __name__ == "__main__":
    main()
