"""The command `carproto`: most cases through `main` in this process, a few as installed, with real interrupts."""

import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from carproto.app.cli import COMMANDS, main, parse
from carproto.config import PHOTO_INVERSION, DemoPlan, EncoderConfig, FinetuneConfig, TrainConfig, TuneConfig
from carproto.toycars.dataset import ToyCars

CARPROTO = Path(sys.executable).parent / "carproto"
TINY = "--size 16 --width 4 --batch 8 --report_every 1000".split()
HELP = """
import io, sys
from contextlib import redirect_stdout
from carproto.app.cli import main
for name in sys.argv[1:]:
    with redirect_stdout(io.StringIO()) as text:
        code = main([name, "--help"])
    assert code == 0 and "--" in text.getvalue() and "torch" not in sys.modules, (name, code)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command within this process, in an empty folder; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run_line(*line: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, line)])
        return code, *capsys.readouterr()

    return run_line


@pytest.fixture(scope="module")
def cars(tmp_path_factory) -> Path:
    """A folder of toy cars among files that must not stop a program."""
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


def test_help_needs_less_than_a_second(tmp_path):
    """CPU seconds are measured, since other work may share the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([CARPROTO, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr and all(name in done.stdout for name in COMMANDS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_of_every_command_needs_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-800:]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    """The comment of a field is the help of its option; it says what None means."""
    classes = COMMANDS[name].__mro__[-2::-1]  # without object; a subclass counts last
    source = "".join(inspect.getsource(kind) for kind in classes)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    for option in fields(COMMANDS[name]):
        if option.name not in ("config", "plan", "refine"):
            assert option.name in comments, f"--{option.name} has no help"
            positional = option.name in ("car_a", "car_b")
            assert option.default is not None or positional or "None" in comments[option.name], option.name


@pytest.mark.parametrize(
    "name, option, words",
    [("blend", "--refine.use_channel_gains {True,False}", "CAR_A CAR_B"), ("train", "--data PATH", "--run PATH")],
)
def test_help_is_to_the_point(name, option, words, capsys):
    """A switch shows both values, positionals have names, options come before rarer ones, None is not said twice."""
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert option in printed and words in printed
    own = re.split("(?:refine|config) options", printed)[0]
    assert own != printed and "(default: None)" not in " ".join(re.sub("[│|]", " ", own).split())
    if name == "train":
        assert printed.index("--data") < printed.index("--run") < printed.index("--heldout")


def test_every_default_is_the_dataclass_of_its_stage():
    assert parse(["train"]).config == TrainConfig() and parse(["train_encoder"]).config == EncoderConfig()
    assert parse(["finetune"]).config == FinetuneConfig() and parse(["tune"]).config == TuneConfig()
    assert parse(["encode", "cars"]).refine == parse(["blend", "seed:1", "seed:2"]).refine == PHOTO_INVERSION
    assert parse(["demo"]).plan == DemoPlan()


@pytest.mark.parametrize("module", ["carproto", "carproto.app.cli"])
def test_python_runs_the_package(module, tmp_path):
    line = [sys.executable, "-m", module, "train", "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--data PATH" in done.stdout


@pytest.mark.parametrize("data, name", [("./data", "runs/a"), ("mydata", "./run"), ("data", "--run")])
def test_values_are_taken_as_they_are(data, name, cars, tmp_path, run):
    """Also where a value ends like the name of an option."""
    for folder in ("data", "mydata"):
        shutil.copytree(cars, tmp_path / folder)
    code, _, errors = run("train", "--data", data, f"--run={name}", "--steps", "1", *TINY)
    assert code == 0 and (tmp_path / name / "final" / "model.safetensors").exists(), errors[-800:]


def test_home_is_expanded_for_reading_and_writing(cars, tmp_path, run, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(cars, home / "cars")
    monkeypatch.setenv("HOME", str(home))
    code, _, errors = run("train", "--data=~/cars", "--run=~/runs/a", "--steps", "1", *TINY)
    assert code == 0 and (home / "runs" / "a" / "final").exists(), errors[-800:]
    out = ["--common=~/runs/a", "--futuristic=~/runs/a", "--out=~/blend", "--intensity", "-0.5:1.5:5", "--extrapolate"]
    code, _, errors = run("blend", "seed:1", "seed:2", *out)
    assert code == 0 and len(list((home / "blend").glob("frame_*.png"))) == 5, errors[-800:]
    assert json.loads((home / "blend" / "recipe.json").read_text())["labels"] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    code, _, errors = run("curate", "~/cars", "--sheet=~/sheet.jpg")
    assert code == 0 and (home / "cars" / "metadata.jsonl").exists() and (home / "sheet.jpg").exists(), errors[-800:]
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "a folder was written beside the home folder"


def test_a_mistake_leaves_the_name_free(cars, run):
    for wrong in (["--lr_g", "-1"], ["--beta2", "1.5"], ["--seed", "99999999999999999999"], ["--batch", "999"]):
        assert run("train", "--data", cars, "--run", "run", *TINY, *wrong)[0] == 2
    code, _, errors = run("train", "--data", cars, "--run", "run", "--steps", "1", *TINY)
    assert code == 0, errors[-800:]


def test_bad_pictures_are_skipped_and_counted(cars, tmp_path, run):
    code, printed, errors = run("train", "--data", cars, "--run", "run", "--steps", "2", *TINY)
    assert code == 0, errors[-800:]
    assert "3 of 67 pictures" in printed + errors
    assert json.loads((tmp_path / "run" / "data.json").read_text())["n_skipped"] == 3


def test_tune_goes_on_and_feeds_finetune_and_blend(cars, tmp_path, run):
    """The run holds a generator and its encoder, and takes its parent's networks; a blend starts from a photo."""
    assert run("train", "--data", cars, "--run", "parent", "--steps", "2", "--z_dim", "16", *TINY)[0] == 0
    line = ["tune", "--source", "parent", "--data", cars, "--run", "tuned", "--encoder_width", "8", "--report_every", 2]
    code, printed, errors = run(*line, "--steps", "3")
    assert code == 0 and "of the variance of 5 held-out images" in printed, errors[-800:]
    code, printed, errors = run(*line, "--steps", "5")  # resumes, and takes the last generator, the encoder's
    assert code == 0 and "next: carproto finetune --source tuned" in printed, errors[-800:]
    rows = [json.loads(row) for row in (tmp_path / "tuned" / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "photo_r2" in row] == [2, 3, 4, 5]
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert (config["size"], config["width"], config["batch"], config["steps"]) == (16, 4, 8, 5)
    encoder = json.loads((tmp_path / "tuned" / "final" / "encoder" / "config.json").read_text())
    assert encoder["steps"] == 5 and encoder["photo_rms_99"] > 0
    code, printed, errors = run("finetune", "--source", "tuned", "--data", cars, "--run", "child", "--steps", "2")
    assert code == 0 and "carproto blend CAR seed:8" in printed, errors[-800:]
    pair = ["--common", "tuned", "--futuristic", "child", "--encoder", "tuned", "--refine.steps", "2"]
    code, _, errors = run("blend", cars / "images" / "toy_000003.png", "seed:8", *pair, "--intensity", "0:1:3")
    assert code == 0 and (tmp_path / "runs" / "blend" / "frame_0.500.png").exists(), errors[-800:]


@pytest.mark.parametrize(
    "line, expected",
    [
        (["tune", "--source", "nowhere"], "nowhere holds no generator"),
        (["tune", "--lr_e", "0"], "lr_e is 0.0: it must be above 0"),
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
        (["compact"], "subspace"),
        (["blend", "seed:x", "seed:2", "--common", "run", "--futuristic", "run"], "run holds no generator"),
    ],
)
def test_a_mistake_is_one_line(line, expected, tmp_path, run):
    (tmp_path / "empty").mkdir()
    code, _, errors = run(*line)
    assert code == 2
    assert expected in errors and errors.startswith("carproto") and errors.count("\n") == 1


def test_a_mistake_ends_the_process_with_its_code(tmp_path):
    done = subprocess.run([CARPROTO, "train", "--size", "50"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("carproto train: size 50") and done.stderr.count("\n") == 1


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
    line[line.index("100000")] = str(step + 1)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").exists(), done.stderr[-500:]


def test_a_killed_run_ends_like_an_undisturbed_one(cars, tmp_path):
    """One process is killed; the undisturbed run and the resumed one have their own, as it had."""
    from safetensors.torch import load_file

    line = ["train", "--data", str(cars), "--steps", "400", *TINY[:-1], "40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [CARPROTO, *line, "--run", "killed"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("killed/checkpoints/*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    for name in ("whole", "killed"):
        subprocess.run([CARPROTO, *line, "--run", name], cwd=tmp_path, env=environment, check=True, capture_output=True)
    whole, killed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == killed[name]).all() for name in whole)
    steps = [json.loads(row)["step"] for row in (tmp_path / "killed" / "stats.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
