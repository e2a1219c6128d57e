"""The console commands as installed: separate processes, real arguments, real interrupts."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from carproto.toycars import ToyCars

BIN = Path(sys.executable).parent
COMMANDS = ("demo", "scrape", "curate", "train", "compact", "finetune", "encode", "blend", "evaluate")
TINY = "--size 16 --width 4 --batch 8 --report_every 1000".split()


def run(folder: Path, *line: str) -> subprocess.CompletedProcess:
    """Run an installed command in a folder."""
    return subprocess.run([BIN / line[0], *line[1:]], cwd=folder, capture_output=True, text=True, timeout=300)


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


def test_every_command_has_help(tmp_path):
    done = run(tmp_path, "carproto_train", "--help")
    assert done.returncode == 0 and "--data" in done.stdout
    for name in COMMANDS:
        assert (BIN / f"carproto_{name}").exists()


def test_bad_pictures_are_skipped_and_counted(cars, tmp_path):
    done = run(tmp_path, "carproto_train", "--data", cars, "--run", "run", "--steps", "2", *TINY)
    assert done.returncode == 0, done.stderr[-800:]
    assert "3 of 67 pictures" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "data.json").read_text())["n_skipped"] == 3


@pytest.mark.parametrize(
    "line, expected",
    [
        (["carproto_train", "--data", "nowhere"], "nowhere"),
        (["carproto_train", "--data", "empty"], "empty"),
        (["carproto_train", "--size", "50"], "choose 16, 32, 64, 128 or 256"),
        (["carproto_blend", "seed:x", "seed:2", "--common", "run", "--futuristic", "run"], "run holds no generator"),
    ],
)
def test_a_mistake_is_one_line(line, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path, *line)
    assert done.returncode == 2
    assert expected in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_interrupt_leaves_a_resumable_run(cars, tmp_path):
    line = [BIN / "carproto_train", "--data", str(cars), "--run", "run", "--steps", "100000", *TINY]
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

    line = [str(BIN / "carproto_train"), "--data", str(cars), "--steps", "160", *TINY[:-1], "40"]
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
