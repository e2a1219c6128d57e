"""A training run that is killed, cut short or out of space goes on exactly where it can, and says so where it cannot."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carproto.checkpoint import list_checkpoints
from carproto.core import CarprotoError
from carproto.toycars import ToyCars
from carproto.train import train_gan
from carproto.trainer import TrainConfig

CONFIG = TrainConfig(size=16, width=4, z_dim=16, batch=8, steps=400, lecam_start=50, report_every=10)

# A single-threaded parent imports once and forks a trainer for each run folder that it reads.
# It reaps the child only at the next line, so that a child that is killed is still there, if only as a zombie.
PARENT = """
import json, os, sys
import torch
from carproto.toycars import ToyCars
from carproto.train import train_gan
from carproto.trainer import TrainConfig
torch.set_num_threads(1)
config, images = TrainConfig(**json.loads(sys.argv[1])), ToyCars(40, 16, seed=0).images
for line in sys.stdin:
    child = os.fork()
    if not child:
        train_gan(images, line.strip(), config, device="cpu", quiet=True)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def last_step(run: Path) -> int:
    """The last step that a run has written down."""
    lines = (run / "stats.jsonl").read_text().splitlines() if (run / "stats.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(asdict(CONFIG))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    dice = random.Random(time.time_ns())

    def run(folder: Path, kill_at: int | None) -> int:
        """Exit status of one session, killed at a random moment after the run has reached a step."""
        parent.stdin.write(f"{folder}\n")
        parent.stdin.flush()
        child, patience = int(parent.stdout.readline()), time.monotonic() + 60
        if kill_at is not None:
            while last_step(folder) < kill_at and time.monotonic() < patience:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        parent.stdin.write("\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    for kill in range(20):
        assert run(tmp_path / "killed", 15 * kill + dice.randint(0, 20)) == -signal.SIGKILL
    assert run(tmp_path / "killed", None) == 0 and run(tmp_path / "whole", None) == 0
    parent.stdin.close()
    parent.wait(10)
    killed, whole = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    states = [torch.load(list_checkpoints(tmp_path / name / "checkpoints")[-1], weights_only=True) for name in ("killed", "whole")]
    assert states[0]["step"] == states[1]["step"] == 400 and torch.equal(states[0]["noise"], states[1]["noise"])
    assert all(torch.equal(states[0]["D"][name], value) for name, value in states[1]["D"].items())
    rows = [[json.loads(line) for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()] for name in ("killed", "whole")]
    for row in rows[0] + rows[1]:
        for name in ("seconds", "waiting", "saving"):
            row.pop(name)
    assert [row["step"] for row in rows[0]] == list(range(10, 401, 10))
    assert rows[0][-1] == rows[1][-1]


@pytest.fixture
def short_run(tmp_path):
    """The pictures and the folder of a run that was stopped after 20 of 40 steps."""
    images = ToyCars(40, 16, seed=0).images
    train_gan(images, tmp_path / "run", TrainConfig(**{**asdict(CONFIG), "steps": 20}), device="cpu", quiet=True)
    return images, tmp_path / "run", TrainConfig(**{**asdict(CONFIG), "steps": 40})


def test_a_truncated_checkpoint_falls_back(short_run):
    images, run, config = short_run
    newest = list_checkpoints(run / "checkpoints")
    assert len(newest) == 2
    newest[-1].write_bytes(newest[-1].read_bytes()[:5000])
    with pytest.warns(UserWarning, match="damaged"):
        result = train_gan(images, run, config, device="cpu", quiet=True)
    assert result.finished


def test_a_full_disk_keeps_the_checkpoint_before(short_run, monkeypatch):
    images, run, config = short_run
    before = list_checkpoints(run / "checkpoints")
    real = os.fsync

    def fsync(handle: int) -> None:
        if "checkpoints" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CarprotoError, match="No space left"):
        train_gan(images, run, config, device="cpu", quiet=True)
    monkeypatch.setattr(os, "fsync", real)
    assert list_checkpoints(run / "checkpoints") == before
    assert train_gan(images, run, config, device="cpu", quiet=True).finished


def test_a_loss_that_is_no_number_stops_and_keeps(short_run, monkeypatch):
    images, run, config = short_run
    before = list_checkpoints(run / "checkpoints")
    monkeypatch.setattr("carproto.trainer.hinge_generator", lambda logits: logits.mean() * float("nan"))
    with pytest.raises(CarprotoError, match="not a number at step 30.*last good checkpoint"):
        train_gan(images, run, config, device="cpu", quiet=True)
    assert list_checkpoints(run / "checkpoints") == before


def test_a_checkpoint_of_another_network_is_refused(short_run, tmp_path):
    images, run, config = short_run
    other = train_gan(images, tmp_path / "other", TrainConfig(**{**asdict(CONFIG), "steps": 2, "width": 8}), device="cpu", quiet=True).run
    for path in list_checkpoints(run / "checkpoints"):
        path.unlink()
    for path in list_checkpoints(other.checkpoints):
        path.rename(run / "checkpoints" / path.name)
    with pytest.raises(CarprotoError, match="another architecture"):
        train_gan(images, run, config, device="cpu", quiet=True)


@pytest.mark.slow
def test_compiled_networks_learn_the_same(tmp_path):
    images = ToyCars(40, 16, seed=0).images
    config = TrainConfig(**{**asdict(CONFIG), "steps": 3, "precision": "fp32", "augment": None})
    runs = [train_gan(images, tmp_path / str(c), config, device="cpu", quiet=True, compile=c).run for c in (False, True)]
    plain, compiled = (run.stats()[-1] for run in runs)
    assert all(abs(plain[name] - compiled[name]) < 1e-3 for name in ("loss_d", "loss_g", "logit_real", "logit_fake"))
