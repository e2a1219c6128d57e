"""`make bench` compares like with like, and writes down what it measured."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from carproto.gan.sngan import Discriminator, Generator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import bench  # noqa: E402
import bench_peers  # noqa: E402


def test_record_holds_what_was_measured(tmp_path):
    path = tmp_path / "new/bench.json"
    options = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--sizes",
        "32:8",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--turn",
        "0",
        "--out",
        str(path),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "studies/bench.py"), *options], capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stdout + done.stderr
    said, record = done.stdout, json.loads(path.read_text(encoding="utf-8"))
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["n_threads"] == 1
    assert {"processor", "commit", "n_cores"} <= record["environment"].keys()
    rows = {row["peer"]: row for row in record["results"]}
    assert {"plain", "ours", "ours, full recipe", "matrix product"} <= rows.keys() and not record["failed"]
    for name, row in rows.items():
        assert (row["size"], row["width"], row["batch"]) == (32, 8, 2) and row["precision"] in ("bf16", "fp32")
        assert (
            len(row["seconds_of_rounds"]) == 2
            and row["seconds"]["low"] == min(row["seconds_of_rounds"]) > 0
            and name in said
        )
    plain, ours = rows["plain"], rows["ours"]
    assert (plain["parameters_g"], plain["parameters_d"]) == (ours["parameters_g"], ours["parameters_d"])
    assert plain["tflop"] == ours["tflop"] > 0 and 50 < ours["memory_mb"] < 20_000
    assert ours["images_per_second"] == pytest.approx(2 * 2 / ours["seconds"]["median"])
    ratios = [p / o for p, o in zip(plain["seconds_of_rounds"], ours["seconds_of_rounds"])]
    assert ours["speed_against"]["plain"] == pytest.approx(
        {"median": sum(ratios) / 2, "low": min(ratios), "high": max(ratios)}
    )
    assert ours["share_of_matrix_rate"]["median"] > 0
    if (bench_peers.MIMICRY_FOLDER / "torch_mimicry").is_dir():
        assert rows["torch-mimicry"]["parameters_g"] > 0 and "torch-mimicry" in ours["speed_against"]
    else:
        assert "`make bench` installs it" in said and list(record["absent"]) == ["torch-mimicry, 32 px, width 8"]


def test_a_peer_that_is_not_installed_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peers, "MIMICRY_FOLDER", tmp_path)
    with pytest.raises(bench_peers.Absent, match="`make bench` installs it"):
        bench_peers.make_mimicry(bench_peers.Work(32, 8, 2, "cpu"))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--sizes", "48"], "size 48 is not possible"),
        (["--sizes", "64:"], "SIZE or SIZE:WIDTH"),
        (["--batch", "1"], "from 2 on"),
        (["--peers", "theirs"], "invalid choice: 'theirs'"),
        (["--device", "tpu"], "device 'tpu' is not usable"),
        (["--out", "README.md/bench.json"], "cannot write README.md/bench.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(arguments, reason, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code and reason in f"{stop.value.code} {capsys.readouterr().err}"


def test_a_peer_that_fails_does_not_end_the_others():
    """One cannot take part, one breaks at the start, one is killed while it waits; the reasons are told."""
    with tqdm(disable=True) as bar:
        results = bench.run_turns(["torch-mimicry", "matrix product"], bench_peers.Work(16, 4, 2, "cpu"), 2, 0, 1, bar)
        broken = bench.run_turns(["plain"], bench_peers.Work(16, 4, 2, "nowhere"), 1, 0, 1, bar)
    assert "torch-mimicry" in results["torch-mimicry"]["absent"] and len(results["matrix product"]["turns"]) == 2
    assert broken["plain"]["failed"].startswith("RuntimeError: ") and not bench.make_rows(
        broken, bench_peers.Work(16, 4, 2, "nowhere")
    )
    child = bench.Child("matrix product", bench_peers.Work(16, 4, 2, "cpu"), 1)
    assert child.hear()["tflop"] > 0
    os.kill(child.process.pid, signal.SIGKILL)
    assert "memory ran out: lower --batch" in child.take_turn(0)["failed"]
    child.stop()


@pytest.mark.parametrize("size", [16, 32])
def test_plain_form_is_the_same_function(size):
    G, D = Generator(size, bench_peers.Z_DIM, 4), Discriminator(size, 4)
    plain_G, plain_D = bench_peers.make_plain_nets(bench_peers.Work(size, 4, 2, "cpu"))
    plain_D = bench_peers.normalise(plain_D)
    plain_G.load_state_dict(G.state_dict())
    plain_D.load_state_dict(D.state_dict())
    source = torch.Generator().manual_seed(0)
    z, x = torch.randn(4, bench_peers.Z_DIM, generator=source), torch.rand(4, 3, size, size, generator=source) * 2 - 1
    torch.testing.assert_close(plain_G(z), G(z), rtol=1e-4, atol=1e-5)
    for _ in range(2):
        torch.testing.assert_close(plain_D(x), D(x), rtol=1e-4, atol=1e-5)


def test_plain_form_has_the_published_size():
    work = bench_peers.Work(128, 64, 128, "cpu")
    with torch.device("meta"):
        G, D = bench_peers.make_plain_nets(work)
    assert bench_peers.count_parameters(G, D) == (32_150_787, 38_419_137)
    assert bench_peers.count_flop(partial(bench_peers.make_plain_nets, work), work.batch) == pytest.approx(
        28.4e12, rel=0.01
    )
