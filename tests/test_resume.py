"""A training run that is killed or out of space resumes exactly where it can, and says where it cannot."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carproto.config import CarprotoError, EncoderConfig, TrainConfig
from carproto.files import load_json, lock_folder
from carproto.gan.finetune import finetune_freezed
from carproto.gan.sngan import Generator, measure_statistics
from carproto.gan.subspace import subspace_run
from carproto.gan.train import best_generator, train_gan
from carproto.gan.trainer import Trainer
from carproto.latent.train_encoder import EncoderTrainer, train_encoder
from carproto.run import RunFolder, list_checkpoints, load_checkpoint
from carproto.toycars.dataset import ToyCars

CONFIG = TrainConfig(size=16, width=4, z_dim=16, batch=8, steps=400, lecam_start=50, report_every=10)

# A single-threaded parent imports once and forks a worker for each line that it reads: a task and its folder.
# It reaps the child only at the next line, so that a child that is killed is still there, if only as a zombie.
# At the end it skips the teardown of PyTorch, which takes seconds on a busy machine.
PARENT = """
import json, os, sys
from pathlib import Path
import torch
from carproto.gan.subspace import subspace_run
from carproto.toycars.dataset import ToyCars
from carproto.gan.train import train_gan
from carproto.gan.trainer import TrainConfig
torch.set_num_threads(1)
config, images = TrainConfig(**json.loads(sys.argv[1])), ToyCars(40, 16, seed=0).images
work = {
    "train": lambda folder: train_gan(images, folder, config, device="cpu", quiet=True),
    "subspace": lambda folder: subspace_run(Path(folder).parent / "source", folder, 5),
}
for line in sys.stdin:
    kind, _, folder = line.strip().partition(" ")
    child = os.fork()
    if not child:
        try:
            work[kind](folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


class Workers:
    """Starts sessions in separate processes, and kills them."""

    def __init__(self):
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, json.dumps(asdict(CONFIG))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def say(self, line: str) -> int:
        """Send a line and read the number that comes back."""
        self.parent.stdin.write(f"{line}\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def run(self, kind: str, folder: Path, wait: Callable[[], None] | None = None) -> int:
        """Exit status of one session, killed when `wait` returns."""
        child = self.say(f"{kind} {folder}")
        if wait is not None:
            wait()
            os.kill(child, signal.SIGKILL)
        return self.say("")

    def close(self) -> None:
        """End the parent."""
        self.parent.stdin.close()
        self.parent.wait(10)


@pytest.fixture(scope="module")
def workers():
    """One parent for all tests."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    results = Workers()
    yield results
    results.close()


def last_step(run: Path) -> int:
    """Return the last step in a run's record."""
    lines = (run / "stats.jsonl").read_text().splitlines() if (run / "stats.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def test_twenty_kills_change_nothing(tmp_path, workers):
    dice = random.Random(time.time_ns())

    def wait(step: int) -> None:
        """Wait for a random moment after the run has reached a step."""
        patience = time.monotonic() + 60
        while last_step(tmp_path / "killed") < step and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.1))

    for kill in range(20):
        step = 15 * kill + dice.randint(0, 20)
        assert workers.run("train", tmp_path / "killed", lambda step=step: wait(step)) == -signal.SIGKILL
    assert workers.run("train", tmp_path / "killed") == 0 and workers.run("train", tmp_path / "whole") == 0
    killed, whole = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    newest = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("killed", "whole")]
    states = [torch.load(path, weights_only=True) for path in newest]
    assert states[0]["step"] == states[1]["step"] == 400 and torch.equal(states[0]["noise"], states[1]["noise"])
    assert all(torch.equal(states[0]["D"][name], value) for name, value in states[1]["D"].items())
    rows = [RunFolder(tmp_path / name).stats() for name in ("killed", "whole")]
    for row in rows[0] + rows[1]:
        for name in ("seconds", "waiting", "saving"):
            row.pop(name)
    assert [row["step"] for row in rows[0]] == list(range(10, 401, 10))
    assert rows[0][-1] == rows[1][-1]


@pytest.mark.parametrize("n_kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_subspace_run_leaves_a_whole_run_or_none(tmp_path, workers, n_kills):
    images = ToyCars(40, 16, seed=0).images
    train_gan(images, tmp_path / "source", TrainConfig(**{**asdict(CONFIG), "steps": 2}), device="cpu", quiet=True)
    start = time.monotonic()
    assert workers.run("subspace", tmp_path / "whole") == 0
    seconds, made = time.monotonic() - start, tmp_path / "killed"
    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    for kill in range(n_kills):
        status = workers.run("subspace", made, lambda part=(kill + 1) / n_kills: time.sleep(seconds * part))
        assert status == -signal.SIGKILL or status == 0
        if made.exists():  # the last kill may come too late
            assert RunFolder(made).config()["z_dim"] == 5 and load_checkpoint(made / "checkpoints")["step"] == 2
            shutil.rmtree(made)
    assert workers.run("subspace", made) == 0
    assert all(
        torch.equal(load_file(made / "final" / "model.safetensors")[name], value) for name, value in expected.items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "source", "whole"]


@pytest.mark.parametrize("killed_in", ["save", "save_best"])
def test_a_kill_around_the_first_checkpoint_loses_nothing(tmp_path, monkeypatch, killed_in):
    images, config = ToyCars(40, 16, seed=0).images, TrainConfig(**{**asdict(CONFIG), "steps": 10})
    options = {"evaluate": lambda G: {"kid": 1.0}, "device": "cpu", "quiet": True}
    train_gan(images, tmp_path / "whole", config, **options)

    def kill(trainer: Trainer, *_: object) -> None:
        if trainer.step:  # `save_best` is called when a run starts, too
            raise KeyboardInterrupt

    monkeypatch.setattr(f"carproto.gan.train.{killed_in}", kill)
    with pytest.raises(KeyboardInterrupt):
        train_gan(images, tmp_path / "killed", config, **options)
    assert len(list_checkpoints(tmp_path / "killed" / "checkpoints")) == (killed_in == "save_best")
    monkeypatch.undo()
    train_gan(images, tmp_path / "killed", config, **options)
    killed, whole = (load_json(tmp_path / name / "best" / "config.json") for name in ("killed", "whole"))
    assert killed == {**whole, "run": "killed"} and whole["steps"] == 10
    killed, whole = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())


@pytest.fixture
def short_run(tmp_path):
    """Return images, the folder of a run stopped after 20 of 40 steps, and the configuration to resume it."""
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
    monkeypatch.setattr("carproto.gan.trainer.hinge_generator", lambda logits: logits.mean() * float("nan"))
    with pytest.raises(CarprotoError, match="not a number at step 30.*last good checkpoint"):
        train_gan(images, run, config, device="cpu", quiet=True)
    assert list_checkpoints(run / "checkpoints") == before


def poison(monkeypatch, at_step: int, then: Callable[[], None] = lambda: None) -> None:
    """Let a weight of the generator become NaN after a step, as an overflow would, and do something ten steps later."""
    step = Trainer.step_generator

    def poisoned(self: Trainer) -> dict:
        losses = step(self)
        if self.step == at_step:
            torch.nn.init.constant_(next(self.G.parameters()), torch.nan)
        if self.step == at_step + 10:
            then()
        return losses

    monkeypatch.setattr(Trainer, "step_generator", poisoned)


def test_weights_that_are_not_finite_are_never_saved(short_run, monkeypatch):
    images, run, config = short_run
    before, final = list_checkpoints(run / "checkpoints"), load_file(run / "final" / "model.safetensors")
    monkeypatch.setattr("carproto.gan.train.Clock.wants_save", lambda clock, is_report: True)
    poison(monkeypatch, 23)
    with pytest.raises(
        CarprotoError, match="holds NaN or infinity at step 23.*the last good checkpoint is .*step_00000022.pt"
    ):
        train_gan(images, run, config, device="cpu", quiet=True)
    assert load_checkpoint(run / "checkpoints")["step"] == 22 and len(list_checkpoints(run / "checkpoints")) == len(
        before
    )
    assert all(
        torch.equal(load_file(run / "final" / "model.safetensors")[name], value) for name, value in final.items()
    )
    monkeypatch.undo()
    assert train_gan(images, run, config, device="cpu", quiet=True).finished


def test_a_session_stopped_with_nan_weights_says_so(tmp_path, monkeypatch):
    poison(monkeypatch, 12, lambda: os.kill(os.getpid(), signal.SIGINT))
    config = TrainConfig(**{**asdict(CONFIG), "report_every": 1000})
    with pytest.raises(CarprotoError, match="holds NaN or infinity at step 22.*there is no good checkpoint yet"):
        train_gan(ToyCars(40, 16, seed=0).images, tmp_path / "run", config, device="cpu", quiet=True)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints") and not (tmp_path / "run" / "final").exists()


def test_nan_in_an_old_checkpoint_falls_back(short_run):
    images, run, config = short_run
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = torch.load(newest, weights_only=True)
    state["G_ema"]["linear.bias"][0] = torch.inf
    torch.save(state, newest)
    with pytest.warns(UserWarning, match="ema.linear.bias holds NaN"):
        assert train_gan(images, run, config, device="cpu", quiet=True).finished


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A generator that an encoder can learn to invert."""
    return measure_statistics(Generator(16, 8, 4), n_batches=2).requires_grad_(False)


def test_an_encoder_that_diverges_keeps_what_was_good(tmp_path, generator, monkeypatch):
    short = EncoderConfig(steps=4, batch=4, width=4, report_every=2)
    train_encoder(generator, tmp_path / "encoder", short, device="cpu", max_minutes=1e-9, quiet=True)
    before = list_checkpoints(tmp_path / "encoder" / "checkpoints")
    step = EncoderTrainer.step_encoder

    def poisoned(self: EncoderTrainer) -> dict:
        losses = step(self)
        if self.step == 3:
            torch.nn.init.constant_(self.E.fc.bias, torch.nan)
        return losses

    monkeypatch.setattr(EncoderTrainer, "step_encoder", poisoned)
    monkeypatch.setattr("carproto.gan.train.Clock.wants_save", lambda clock, is_report: True)
    with pytest.raises(CarprotoError, match="E.fc.bias holds NaN or infinity at step 3.*the last good checkpoint is"):
        train_encoder(generator, tmp_path / "encoder", short, device="cpu", quiet=True)
    assert before and load_checkpoint(tmp_path / "encoder" / "checkpoints")["step"] == 2
    monkeypatch.undo()
    assert train_encoder(generator, tmp_path / "encoder", short, device="cpu", quiet=True).finished
    for path in list_checkpoints(tmp_path / "encoder" / "checkpoints"):
        path.unlink()
    with pytest.raises(CarprotoError, match="an encoder and no checkpoint"):
        train_encoder(generator, tmp_path / "encoder", short, device="cpu", quiet=True)


def test_runs_of_another_kind_are_refused(short_run, tmp_path, generator):
    images, run, config = short_run
    with pytest.raises(CarprotoError, match="not of an encoder's training"):
        train_encoder(generator, run, EncoderConfig(steps=1, batch=4, width=4), device="cpu", quiet=True)
    short = EncoderConfig(steps=1, batch=4, width=4)
    encoder = train_encoder(generator, tmp_path / "encoder", short, device="cpu", quiet=True).run
    starts = [lambda: subspace_run(encoder.path, tmp_path / "new")]
    starts.append(lambda: finetune_freezed(encoder.path, images, tmp_path / "new"))
    for start in starts:
        with pytest.raises(CarprotoError, match="train one first|no training run of a generator"):
            start()


def test_a_run_without_a_checkpoint_says_so(short_run, tmp_path, capsys):
    images, run, config = short_run
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CarprotoError, match="holds the generator in .*final and no checkpoint"):
        train_gan(images, run, config, device="cpu", quiet=True)
    shutil.rmtree(run / "final")
    assert train_gan(images, run, config, device="cpu", quiet=True).finished
    assert "holds no checkpoint yet: the run begins at step 0" in capsys.readouterr().err
    short = subspace_run(run, tmp_path / "short", 5)
    shutil.rmtree(short.checkpoints)
    shutil.rmtree(short.path / "final")
    with pytest.raises(CarprotoError, match="a latent subspace and no checkpoint"):
        train_gan(images, short.path, TrainConfig(**short.config()), device="cpu", quiet=True)


def test_two_trainers_share_no_folder(short_run, generator):
    images, run, config = short_run
    rows = RunFolder(run).stats()
    with lock_folder(run, work="training"):
        with pytest.raises(CarprotoError, match="another training is writing into"):
            train_gan(images, run, config, device="cpu", quiet=True)
        with pytest.raises(CarprotoError, match="another training is writing into"):
            train_encoder(generator, run, device="cpu", quiet=True)
    assert RunFolder(run).stats() == rows
    assert train_gan(images, run, config, device="cpu", quiet=True).finished


def test_leftovers_of_dead_sessions_go(short_run):
    images, run, config = short_run
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"{folder}/.a.{dead.pid}.00ff.tmp" for folder in (".", "checkpoints", "samples", "final")]
    for name in names:
        (run / name).write_text("half")
    train_gan(images, run, config, device="cpu", quiet=True)
    assert not [name for name in names if (run / name).exists()]


def test_a_full_disk_at_the_end_loses_nothing(short_run, monkeypatch):
    images, run, config = short_run
    before = load_file(run / "final" / "model.safetensors")
    write = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.parent.name == "final":
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(CarprotoError, match="final/model.safetensors: No space left on device"):
        train_gan(images, run, config, device="cpu", quiet=True)
    monkeypatch.undo()
    assert all(
        torch.equal(load_file(run / "final" / "model.safetensors")[name], value) for name, value in before.items()
    )
    assert load_checkpoint(run / "checkpoints")["step"] == 40 and not list((run / "final").glob(".*"))
    result = train_gan(images, run, config, device="cpu", quiet=True)
    assert best_generator(run, "cpu").fingerprint() == result.generator.fingerprint()


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive"), MemoryError()])
def test_a_full_memory_is_explained(short_run, monkeypatch, error):
    images, run, config = short_run

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("carproto.gan.trainer.hinge_generator", fail)
    with pytest.raises(CarprotoError, match="the memory is full with batch 8"):
        train_gan(images, run, config, device="cpu", quiet=True)


def test_how_photos_became_square_goes_with_the_generator(tmp_path):
    config = TrainConfig(**{**asdict(CONFIG), "steps": 4, "report_every": 2})
    images, about = ToyCars(40, 16, seed=0).images, {"fit": "crop"}
    options = {"evaluate": lambda G: {"kid": 1.0}, "about": about, "device": "cpu", "quiet": True}
    result = train_gan(images, tmp_path / "run", config, **options)
    assert result.generator.fit == best_generator(tmp_path / "run", "cpu").fit == "crop"
    assert [load_json(tmp_path / "run" / name / "config.json")["fit"] for name in ("best", "final")] == ["crop", "crop"]
    assert best_generator(subspace_run(tmp_path / "run", tmp_path / "short", 5).path, "cpu").fit == "crop"


def test_a_checkpoint_of_another_network_is_refused(short_run, tmp_path):
    images, run, config = short_run
    wider = TrainConfig(**{**asdict(CONFIG), "steps": 2, "width": 8})
    other = train_gan(images, tmp_path / "other", wider, device="cpu", quiet=True).run
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
    runs = [
        train_gan(images, tmp_path / str(c), config, device="cpu", quiet=True, compile=c).run for c in (False, True)
    ]
    plain, compiled = (run.stats()[-1] for run in runs)
    assert all(abs(plain[name] - compiled[name]) < 1e-3 for name in ("loss_d", "loss_g", "logit_real", "logit_fake"))
