"""The study of the time to a target KID resumes exactly, stops at the target and compares the times rightly."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from carproto.config import CarprotoError, TrainConfig
from carproto.eval.features import feature_extractor
from carproto.files import load_json
from carproto.run import RunFolder, load_checkpoint
from carproto.toycars.dataset import ToyCars

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))
import photo_pair as study_pair  # noqa: E402
import time_to_quality as study_time  # noqa: E402

SETS = ["--data", "train.zip", "--heldout", "heldout.zip", "--extractor", "toys"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the study with few small toy cars; return the run's folder."""
    frame = SimpleNamespace(config=study_pair.AlignConfig())
    sizes = {"train.zip": 24, "heldout.zip": 16}
    opened = {name: SimpleNamespace(images=ToyCars(n, 16, seed=n).images, align=frame) for name, n in sizes.items()}
    monkeypatch.setattr(study_time, "CONFIG", TrainConfig(size=16, z_dim=8, batch=4, lecam_weight=0.0))
    monkeypatch.setattr(study_time, "N_FAKE", 16)
    monkeypatch.setattr(study_time, "open_aligned", lambda path, arguments, size: opened[path.name])
    monkeypatch.setattr(study_time, "mobilenet_extractor", lambda path, size: feature_extractor(str(path)))

    def run(folder: str, *options: str, recipe: str = "carproto") -> RunFolder:
        words = ["train", recipe, *SETS, "--width", "2", "--every", "2", "--runs", str(tmp_path / folder), *options]
        study_time.main(words)
        return RunFolder(tmp_path / folder / f"{recipe}_0")

    return run


@pytest.mark.parametrize("recipe", ["carproto", "2022"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(train, monkeypatch, recipe):
    monkeypatch.setattr("carproto.gan.trainer.choose_fused", lambda net, x, precision: {})  # a choice by timing
    options = {"recipe": recipe}
    whole = train("whole", "--steps", "4", "--target", "0", **options)
    run_step = study_time.run_step

    def die_at_step_3(trainer) -> float:
        if trainer.step == 3:
            raise RuntimeError("killed")
        return run_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(study_time, "run_step", die_at_step_3)
        with pytest.raises(RuntimeError, match="killed"):
            train("killed", "--steps", "4", "--target", "0", **options)
    killed = train("killed", "--steps", "4", "--target", "0", **options)
    assert [row["step"] for row in killed.stats()] == [2, 4] and killed.stats() == whole.stats()
    states = [load_checkpoint(run.checkpoints) for run in (whole, killed)]
    for name in ("G", "D", "G_ema"):
        assert all(torch.equal(a, b) for a, b in zip(*(state[name].values() for state in states)))
    assert [session["step"] for session in killed.stats("sessions.jsonl")] == [0, 2]


def test_run_stops_at_the_target_and_goes_on_to_a_lower_one(train):
    for _ in range(2):  # the second call finds nothing to do
        run = train("runs", "--steps", "6", "--target", "1e9")
        assert [row["step"] for row in run.stats()] == [2]
    assert [row["step"] for row in train("runs", "--steps", "6", "--target", "0").stats()] == [2, 4, 6]
    with pytest.raises(SystemExit, match="width cannot change"):
        train("runs", "--steps", "6", "--width", "4")
    with pytest.raises(SystemExit, match="a run needs recipe, data, heldout, extractor"):
        study_time.main(["train"])


def test_interrupted_run_keeps_the_steps_since_its_last_measurement(train, monkeypatch):
    run_step = study_time.run_step

    def interrupt_after_step_3(trainer) -> float:
        seconds = run_step(trainer)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return seconds

    monkeypatch.setattr(study_time, "run_step", interrupt_after_step_3)
    run = train("runs", "--steps", "6", "--target", "0")
    assert load_checkpoint(run.checkpoints)["step"] == 3 and [row["step"] for row in run.stats()] == [2]


def test_plain_engine_is_timed_in_fp32_without_fused_layers(train, tmp_path, capsys):
    runs = ["--runs", str(tmp_path / "runs"), "--width", "2"]
    study_time.main(["time", *SETS[:2], "--rounds", "2", *runs])
    timed = load_json(tmp_path / "runs/seconds.json")
    assert list(timed["rounds"][0]) == ["carproto", "2022", study_time.PLAIN] and len(timed["rounds"]) == 2
    assert timed["engines"][study_time.PLAIN] == {"precision": "fp32", "fused": []}
    with pytest.raises(SystemExit, match="holds no runs"):
        study_time.main(["report", *runs, "--out", str(tmp_path / "records")])
    for recipe in study_time.RECIPES:
        train("runs", "--steps", "2", "--target", "1e9", recipe=recipe)
    study_time.main(["report", *runs, "--target", "1e9", "--out", str(tmp_path / "records")])
    record = load_json(tmp_path / "records/time_to_quality.json")
    assert record["steps"] == {"carproto": 2, "2022": 2} and record["2022_reached_it"]
    assert "seed" not in record["configs"]["2022"] and record["configs"]["2022"]["lr_d"] == 2e-4
    rows = RunFolder(tmp_path / "records").stats("time_to_quality.jsonl")
    assert [row["recipe"] for row in rows] == ["2022", "carproto"] and rows[0]["measured"][0]["step"] == 2
    assert "the same engine: " in capsys.readouterr().out


def _run(recipe: str, kids: list[float], every: int, seed: int = 0) -> dict:
    rows = [{"step": every * (i + 1), "kid": value} for i, value in enumerate(kids)]
    return {"recipe": recipe, "seed": seed, "measured": rows}


def test_times_to_a_target_are_steps_by_seconds_of_a_step():
    seconds = {"carproto": 0.5, "2022": 0.6, study_time.PLAIN: 2.0}
    ours, unfinished = _run("carproto", [2.0, 1.4, 1.6], 100), _run("2022", [3.0, 2.0], 250)
    other = [_run("carproto", [3.0], 100, seed=1), _run("2022", [4.0], 250, seed=1)]
    result = study_time.compare_times([ours, unfinished, *other], seconds, 1.5)
    assert result["steps"] == {"carproto": 200, "2022": 500} and not result["2022_reached_it"]
    assert result["seconds"] == {"carproto": 100.0, "2022": 300.0, study_time.PLAIN: 1000.0}
    assert result["ratio"] == {"the same engine": 3.0, "plain fp32": 10.0}
    result = study_time.compare_times([ours, _run("2022", [3.0, 2.0, 1.5, 1.2], 250)], seconds, 1.5)
    assert result["steps"]["2022"] == 750 and result["2022_reached_it"]
    with pytest.raises(CarprotoError, match="ours at a KID of 1.5"):
        study_time.compare_times(other, seconds, 1.5)
