"""Keep the networks of a long run as small weights from which training can go on where the run itself is lost.

    python tools/milestone.py runs/photo64 data/milestones/photo64     # half-precision safetensors and a config.json

`read_milestone` gives what `train_gan(..., parent=...)` takes. Adam's moments are not kept: they start at zero.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from carproto.config import CarprotoError
from carproto.files import load_json, save_json
from carproto.run import load_checkpoint
from carproto.weights import save_weights

PARTS = ("G", "D", "F", "G_ema", "E_ema")  # of a checkpoint: F the heads on pretrained features, E_ema the encoder


def write_milestone(run: Path, folder: Path) -> Path:
    """Write the newest good checkpoint's networks in half precision."""
    state = load_checkpoint(run / "checkpoints")
    if state is None:
        raise CarprotoError(f"{run} holds no checkpoint: give the folder of a training run")
    rows = [row for row in (run / "stats.jsonl").read_text(encoding="utf-8").split("\n") if '"kid"' in row]
    about = {"kind": "milestone", "step": state["step"], "config": state["config"], "features": state.get("features")}
    tensors = {f"{part}.{name}": value for part in PARTS for name, value in state.get(part, {}).items()}
    save_weights(tensors, folder, about, precision="fp16")
    if rows:
        (folder / "last_report.json").write_text(rows[-1] + "\n", encoding="utf-8")
    if (run / "data.json").exists():
        save_json(load_json(run / "data.json"), folder / "data.json")
    return folder


def read_milestone(folder: Path) -> dict:
    """Read the networks back as a parent for `train_gan`: weights by part, features' fingerprint, configuration."""
    about, parent = load_json(folder / "config.json"), {}
    for name, value in load_file(folder / "model.safetensors").items():
        part, _, key = name.partition(".")
        parent.setdefault(part, {})[key] = value.float() if value.is_floating_point() else value
    if "E_ema" in parent:
        parent["E"] = dict(parent["E_ema"])
    if about.get("features"):
        parent["features"] = about["features"]
    return {**parent, "config": about["config"]}


def main(argv: list[str] | None = None) -> None:
    """Write a milestone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("folder", type=Path, help="where the weights go")
    arguments = parser.parse_args(argv)
    folder = write_milestone(arguments.run, arguments.folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.1f} MB, step {load_json(folder / 'config.json')['step']}")


if __name__ == "__main__":
    main()
