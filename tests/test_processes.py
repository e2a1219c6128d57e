"""Training by two processes: the same gradients as one, one writer, and an exact resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carproto.app.cli import main
from carproto.config import TrainConfig
from carproto.gan.losses import hinge_generator
from carproto.gan.trainer import Trainer
from carproto.toycars.dataset import ToyCars

pytest.importorskip("accelerate")
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]

CONFIG = TrainConfig(size=16, width=4, z_dim=16, batch=8, augment=None, lecam_start=0, precision="fp32")
CHILD = """
import sys, torch
from test_processes import CONFIG, gradients, make_trainer
trainer = make_trainer()
torch.save(gradients(trainer), f"{sys.argv[1]}/{trainer.processes.index}.pt")
"""


def make_trainer() -> Trainer:
    """Make a trainer whose latents are the process's part of one fixed batch."""
    trainer = Trainer(ToyCars(24, 16, seed=0).images, CONFIG, torch.device("cpu"))
    latents = torch.randn(CONFIG.batch, CONFIG.z_dim, generator=torch.Generator().manual_seed(5))
    trainer.sample_z = lambda: latents.chunk(trainer.processes.n)[trainer.processes.index]
    return trainer


def gradients(trainer: Trainer) -> dict:
    """Return the gradients of one step of D and G, and LeCam's means, with fixed BatchNorm statistics."""
    trainer.G.eval()
    trainer.step_discriminator()
    results = {f"D.{name}": p.grad.clone() for name, p in trainer.D.named_parameters()}
    trainer.G.train()
    trainer.step_generator()
    results |= {f"G.{name}": p.grad.clone() for name, p in trainer.G.named_parameters()}
    return {**results, "mean_real": trainer.lecam.mean_real, "mean_fake": trainer.lecam.mean_fake}


def test_two_processes_learn_what_one_with_the_whole_batch_learns(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*LAUNCHER, tmp_path / "child.py", tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    both = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in (0, 1)]
    alone = make_trainer()
    expected = gradients(alone)
    again = make_trainer()  # the generator normalises each process's share: one process with its batch in two parts
    again.G.eval()
    again.step_discriminator()
    again.D.eval()
    parts = [again.D(again.G.train()(part)) for part in again.sample_z().chunk(2)]
    hinge_generator(torch.cat(parts)).backward()
    expected |= {f"G.{name}": p.grad for name, p in again.G.named_parameters()}
    for name, value in expected.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert (both[0][name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if name.startswith("G."))


SESSIONS = """
import sys
from carproto.app.cli import main
for line in sys.argv[1:]:
    status = main(line.split())
sys.exit(status)
"""
TINY = "--size 16 --width 4 --batch 8 --report-every 4 --device cpu"


def launch(folder: Path, *line: object) -> subprocess.CompletedProcess:
    """Run a program as two processes."""
    return subprocess.run(
        [*LAUNCHER, *line], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_two_processes_write_one_run_and_resume_exactly(tmp_path, monkeypatch, capsys):
    """One launch trains two runs, and ends in a mistake; the installed command resumes one in another launch."""
    ToyCars(40, 16, seed=2).save(tmp_path / "cars")
    (tmp_path / "sessions.py").write_text(SESSIONS)
    runs = {"whole": "--steps 8", "parts": "--steps 4", "uneven": "--steps 4 --batch 7"}
    lines = [f"train --data cars --run {run} {TINY} {options}" for run, options in runs.items()]
    first = launch(tmp_path, tmp_path / "sessions.py", *lines)
    assert first.returncode != 0 and "multiple of 2" in first.stderr, first.stderr[-2000:]
    second = launch(tmp_path, BIN / "carproto", *lines[1].replace("--steps 4", "--steps 8").split())
    assert second.returncode == 0, second.stderr[-2000:]
    whole, parts = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(row)["step"] for row in (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()]
    assert steps == [4, 8]
    sessions = [json.loads(row) for row in (tmp_path / "parts" / "sessions.jsonl").read_text().splitlines()]
    assert [(row["step"], row["n_processes"]) for row in sessions] == [(0, 2), (4, 2)]
    monkeypatch.chdir(tmp_path)
    alone = main("train --data cars --run parts --size 16 --width 4 --batch 8 --steps 9".split())
    assert alone == 2 and "trained by 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "launcher", [{"WORLD_SIZE": "2"}, ["accelerate", "launch", "--cpu", "--num_processes", "2", "--no_python"]]
)
def test_a_launch_that_does_not_join_ends_in_one_line(tmp_path, launcher):
    ToyCars(40, 16, seed=2).save(tmp_path / "cars")
    front = [BIN / launcher[0], *launcher[1:]] if isinstance(launcher, list) else []
    tiny = "--size 16 --width 4 --batch 8 --steps 2".split()
    line = [*front, BIN / "carproto", "train", "--data", tmp_path / "cars", "--run", "run", *tiny]
    environment = ENVIRONMENT | (launcher if isinstance(launcher, dict) else {})
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    said = [row for row in done.stderr.splitlines() if row.startswith("carproto train: ")]
    assert done.returncode != 0 and len(said) == 1 and "torchrun --nproc_per_node" in said[0], done.stderr[-2000:]
    assert not (tmp_path / "run").exists()
