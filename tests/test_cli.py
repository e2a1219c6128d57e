"""The command `carproto` as installed: separate processes, real arguments, real interrupts."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from carproto.app.cli import COMMANDS, parse
from carproto.config import PHOTO_INVERSION, DemoPlan, EncoderConfig, FinetuneConfig, TrainConfig
from carproto.toycars.dataset import ToyCars

CARPROTO = Path(sys.executable).parent / "carproto"
TINY = "--size 16 --width 4 --batch 8 --report_every 1000".split()


def run(folder: Path, *line: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the installed command in a folder."""
    return subprocess.run(
        [CARPROTO, *line], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def cars(tmp_path_factory) -> Path:
    """A folder of toy cars among pictures that no program should trip over."""
    folder = tmp_path_factory.mktemp("data") / "cars"
    ToyCars(60, 32, seed=5).save(folder)
    (folder / "images" / "text.jpg").write_text("this is no picture")
    whole = (folder / "images" / "toy_000000.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / "images" / "dot.png")
    Image.new("CMYK", (40, 40), (0, 200, 200, 0)).save(folder / "images" / "cmyk.jpg")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(folder / "images" / "clear.png")
    Image.new("I;16", (40, 40), 40_000).save(folder / "images" / "deep.png")
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(folder / "images" / "moving.webp", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_comes_within_a_second_and_without_torch(name, tmp_path):
    """CPU seconds are measured, since other work may share the machine."""
    latent = "import sys; from carproto.app.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    line = [sys.executable, "-c", latent]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*line, *([name] if name else []), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.endswith("False\n") and not done.stderr
    assert all(other in done.stdout for other in COMMANDS) if name is None else "--" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_every_default_is_the_dataclass_of_its_stage():
    assert parse(["train"]).config == TrainConfig() and parse(["encode"]).config == EncoderConfig()
    assert parse(["finetune"]).config == FinetuneConfig()
    assert parse(["encode"]).refine == parse(["blend", "seed:1", "seed:2"]).refine == PHOTO_INVERSION
    assert parse(["demo"]).plan == DemoPlan()


@pytest.mark.parametrize("module", ["carproto", "carproto.app.cli"])
def test_python_runs_the_package(module, tmp_path):
    done = subprocess.run([sys.executable, "-m", module, "train", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--data PATH" in done.stdout


@pytest.mark.parametrize("data, name", [("./data", "runs/a"), ("mydata", "runs/b"), ("data", "./run"), ("data", "--run")])
def test_values_are_taken_as_they_are(data, name, cars, tmp_path):
    """Also where a value ends like the name of an option."""
    for folder in ("data", "mydata"):
        shutil.copytree(cars, tmp_path / folder)
    done = run(tmp_path, "train", "--data", data, f"--run={name}", "--steps", "1", *TINY)
    assert done.returncode == 0 and (tmp_path / name / "final" / "model.safetensors").exists(), done.stderr[-800:]


def test_home_is_expanded_for_reading_and_writing(cars, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(cars, home / "cars")
    done = run(tmp_path, "train", "--data=~/cars", "--run=~/runs/a", "--steps", "1", *TINY, HOME=str(home))
    assert done.returncode == 0 and (home / "runs" / "a" / "final").exists(), done.stderr[-800:]
    out = ["--common=~/runs/a", "--futuristic=~/runs/a", "--out=~/blend", "--intensity", "-0.5:1.5:5", "--extrapolate"]
    done = run(tmp_path, "blend", "seed:1", "seed:2", *out, HOME=str(home))
    assert done.returncode == 0 and len(list((home / "blend").glob("frame_*.png"))) == 5, done.stderr[-800:]
    assert json.loads((home / "blend" / "recipe.json").read_text())["labels"] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    done = run(tmp_path, "curate", "~/cars", "--sheet=~/sheet.jpg", HOME=str(home))
    assert done.returncode == 0 and (home / "cars" / "metadata.jsonl").exists() and (home / "sheet.jpg").exists(), done.stderr[-800:]
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "a folder was written beside the home folder"


def test_a_mistake_leaves_the_name_free(cars, tmp_path):
    for wrong in (["--lr_g", "-1"], ["--beta2", "1.5"], ["--seed", "99999999999999999999"], ["--batch", "999"]):
        assert run(tmp_path, "train", "--data", cars, "--run", "run", *TINY, *wrong).returncode == 2
    done = run(tmp_path, "train", "--data", cars, "--run", "run", "--steps", "1", *TINY)
    assert done.returncode == 0, done.stderr[-800:]


def test_bad_pictures_are_skipped_and_counted(cars, tmp_path):
    done = run(tmp_path, "train", "--data", cars, "--run", "run", "--steps", "2", *TINY)
    assert done.returncode == 0, done.stderr[-800:]
    assert "3 of 67 pictures" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "data.json").read_text())["n_skipped"] == 3


@pytest.mark.parametrize(
    "line, expected",
    [
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "empty"], "empty"),
        (["train", "--data", ""], "a path is empty"),
        (["train", "--size", "50"], "choose 16, 32, 64, 128 or 256"),
        (["train", "--lr_d", "nan"], "lr_d is nan: it must be above 0"),
        (["train", "--max_minutes", "-3"], "max_minutes is -3.0"),
        (["train", "--report-evry", "3"], "perhaps you meant --report_every"),
        (["train", "--data"], "Missing value for argument '--data'"),
        (["paint"], "Available subcommands: demo, scrape"),
        ([], "Expected one of {demo, scrape"),
        (["scrape"], "car-connection or search"),
        (["blend", "seed:x", "seed:2", "--common", "run", "--futuristic", "run"], "run holds no generator"),
    ],
)
def test_a_mistake_is_one_line(line, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path, *line)
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.startswith("carproto") and done.stderr.count("\n") == 1


def test_interrupt_leaves_a_resumable_run(cars, tmp_path):
    line = [CARPROTO, "train", "--data", str(cars), "--run", "run", "--steps", "100000", *TINY]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stats, deadline = tmp_path / "run" / "stats.jsonl", time.monotonic() + 200
    while not stats.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert "the same call goes on from here" in out, out + err[-500:]
    assert "Traceback" not in err
    step = int(sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1].stem.split("_")[1])
    assert step >= 50
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    line[line.index("100000")] = str(step + 1)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").exists(), done.stderr[-500:]


def test_a_killed_run_ends_like_an_undisturbed_one(cars, tmp_path):
    from safetensors.torch import load_file

    line = [CARPROTO, "train", "--data", str(cars), "--steps", "160", *TINY[:-1], "40"]
    subprocess.run([*line, "--run", "whole"], cwd=tmp_path, capture_output=True, timeout=200, check=True)
    process = subprocess.Popen([*line, "--run", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("killed/checkpoints/*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run([*line, "--run", "killed"], cwd=tmp_path, capture_output=True, timeout=200, check=True)
    whole, killed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == killed[name]).all() for name in whole)
    steps = [json.loads(row)["step"] for row in (tmp_path / "killed" / "stats.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
