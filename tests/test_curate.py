"""Curation when things go wrong: a full disk, a second curation at once, a kill in the middle, sets in zips."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from carproto.core import CarprotoError
from carproto.curate import curate, undo_curation
from carproto.dataset import CarImages
from carproto.toycars import ToyCars

FULL_DISK = """
import resource, signal, sys
from carproto.core import CarprotoError
from carproto.curate import curate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    curate(sys.argv[1], quiet=True)
except CarprotoError as error:
    print(error)
"""
CURATE = "import sys; from carproto.curate import curate; print(len(curate(sys.argv[1], quiet=True)))"


@pytest.fixture
def cars(tmp_path) -> Path:
    """A folder of toy cars with what is known of them, and one copy."""
    folder = tmp_path / "cars"
    toys = ToyCars(40, 128, seed=7)
    toys.save(folder)
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "toy_000003.png").read_bytes())
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_verdicts_reach_the_data_set_and_go_again(cars):
    before = lines(cars)
    curate(cars, quiet=True)
    assert [row["file_name"] for row in lines(cars) if not row["keep"]] == ["images/toy_000003.png"]
    assert len(CarImages(cars, 32, cache=False, progress=False)) == 40
    assert undo_curation(cars) == 41
    assert [row for row in lines(cars) if "body" in row] == before
    assert len(CarImages(cars, 32, cache=False, progress=False)) == 41


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
def test_a_full_disk_keeps_the_old_manifest(cars):
    before = (cars / "metadata.jsonl").read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, cars], capture_output=True, text=True, timeout=120)
    assert "cannot write" in done.stdout and "the previous file is kept" in done.stdout, done.stderr[-500:]
    assert (cars / "metadata.jsonl").read_bytes() == before
    assert not list(cars.glob(".*.tmp"))
    assert len(curate(cars, quiet=True)) == 41


@pytest.mark.skipif(os.name == "nt", reason="no SIGSTOP")
def test_a_second_curation_at_once_is_refused(cars):
    process = subprocess.Popen([sys.executable, "-c", CURATE, cars], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (cars / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(CarprotoError, match="another"):
            curate(cars, quiet=True)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=60)[0].strip() == "41"
    assert len(curate(cars, quiet=True)) == 41


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("delay", [0, 0.1])
def test_a_kill_loses_nothing(cars, delay):
    process = subprocess.Popen([sys.executable, "-c", CURATE, cars], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cars / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    known = {row["file_name"]: row for row in lines(cars)}
    assert all(known[f"images/toy_{i:06d}.png"]["body"] for i in range(40))
    assert sum(not row["keep"] for row in curate(cars, quiet=True)) == 1


def test_a_zip_is_read_but_never_written(cars, tmp_path):
    archive = tmp_path / "heldout.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for i in (5, 6):
            out.write(cars / "images" / f"toy_{i:06d}.png", f"images/car_{i}.png")
    before = archive.read_bytes()
    rows = {row["file_name"]: row for row in curate(cars, against=archive, quiet=True)}
    assert rows["images/toy_000005.png"]["reasons"] == ["near-duplicate of ../heldout.zip/images/car_5.png"]
    assert sum(not row["keep"] for row in rows.values()) == 3
    assert archive.read_bytes() == before
    with pytest.raises(CarprotoError, match="unpack it into a folder"):
        curate(archive, quiet=True)


def test_two_sets_agree_whatever_was_run_before(cars, tmp_path):
    other = tmp_path / "tomorrow"
    ToyCars(3, 256, seed=7, start=10).save(other)
    for _ in range(2):
        curate(cars, against=other, quiet=True)
        kept = [row["file_name"] for row in lines(cars) if row["keep"]]
        assert len(kept) == 37 and not any(row.get("keep") is False for row in lines(other))
    ToyCars(1, 64, seed=7, start=20).save(tmp_path / "small")
    curate(cars, against=tmp_path / "small", quality={"min_side": None}, quiet=True)
    assert lines(tmp_path / "small")[0]["copy_of"] == "../cars/images/toy_000020.png"
    (cars / "images" / "toy_000020.png").unlink()
    curate(cars, against=tmp_path / "small", quality={"min_side": None}, quiet=True)
    assert lines(tmp_path / "small")[0]["keep"] is True


def test_a_folder_in_which_nothing_opens_says_so(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    assert all("unreadable" in row["reasons"][0] for row in curate(tmp_path, quiet=True))
