"""Curation when things go wrong: a full disk, a second curation at once, a kill in the middle, sets in zips."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from carproto.config import CarprotoError
from carproto.data.curate import contact_sheet, curate, undo_curation
from carproto.data.dataset import CarImages
from carproto.toycars.dataset import ToyCars

FULL_DISK = """
import resource, signal, sys
from carproto.core import CarprotoError
from carproto.data.curate import curate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    curate(sys.argv[1], quiet=True)
except CarprotoError as error:
    print(error)
"""
CURATE = "import sys; from carproto.data.curate import curate; print(len(curate(sys.argv[1], quiet=True)))"


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
        selected = [row["file_name"] for row in lines(cars) if row["keep"]]
        assert len(selected) == 37 and not any(row.get("keep") is False for row in lines(other))
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


def test_each_verdict_goes_to_the_nearest_manifest(cars):
    inner = cars / "more"
    inner.mkdir()
    for i, name in enumerate(("c.png", "d.png")):
        (inner / name).write_bytes((cars / "images" / f"toy_00000{i}.png").read_bytes())
    (inner / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "c.png", "make": "Near", "keep": false, "reasons": ["old"]}\n'
    )
    with open(cars / "metadata.jsonl", "a") as manifest:
        manifest.write('{"file_name": "more/c.png", "make": "Far", "view": "left", "keep": true}\n')
    rows = {row["file_name"]: row for row in curate(cars, quiet=True)}
    assert (rows["more/c.png"]["make"], rows["more/c.png"]["view"], rows["more/c.png"]["keep"]) == (
        "Near",
        "left",
        False,
    )
    near = {row["file_name"]: row for row in lines(inner)}
    assert (
        set(near) == {"c.png", "d.png"}
        and "view" not in near["c.png"]
        and near["c.png"]["copy_of"] == "images/toy_000000.png"
    )
    assert {row["file_name"]: row for row in lines(cars)}["more/c.png"] == {
        "file_name": "more/c.png",
        "make": "Far",
        "view": "left",
    }
    assert len(CarImages(cars, 32, cache=False, progress=False)) == 40
    assert curate(cars, quiet=True) == list(rows.values())
    assert undo_curation(cars) == 43 and not any("keep" in row for row in lines(inner) + lines(cars))
    (cars / "metadata.jsonl").unlink()
    with pytest.raises(CarprotoError, match="the metadata.jsonl lies in .*more: curate that folder"):
        curate(cars, quiet=True)


def test_odd_names_titles_and_lines_do_not_stop_a_curation(cars):
    content = (cars / "images" / "toy_000001.png").read_bytes()
    if sys.platform == "linux":
        Path(os.fsdecode(os.fsencode(cars) + b"/images/caf\xe9.png")).write_bytes(content)
    manifest = cars / "metadata.jsonl"
    rows = [
        {"file_name": "images/toy_000002.png", "title": "a\u2028b\x85c \ud83d"},
        {"file_name": 5},
        {"file_name": "../../x", "reasons": 3},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    manifest.write_bytes(
        b"\xef\xbb\xbf" + manifest.read_bytes() + text.encode("utf-8", "surrogatepass") + b'{"a":' * 99_999
    )
    with pytest.warns(UserWarning, match="2 broken lines"):
        verdicts = {row["file_name"]: row for row in curate(cars, quiet=True)}
    assert verdicts["images/toy_000002.png"]["title"].startswith("a\u2028b\x85c ")
    after = manifest.read_bytes()
    assert len(after.decode("utf-8").splitlines()) == len(after.split(b"\n")) - 1 == len(verdicts) + 1
    assert len(CarImages(cars, 32, cache=False, progress=False)) == 40
    assert curate(cars, quiet=True) == list(verdicts.values())


def test_formats_that_start_other_programs_are_unreadable(cars):
    for name, mode, kind in (("page.jpg", "RGB", "EPS"), ("page.png", "F", "SPIDER")):
        stream = io.BytesIO()  # a path would make Pillow write every later .png as SPIDER
        Image.new("RGB", (200, 150), "navy").convert(mode).save(stream, kind)
        (cars / "images" / name).write_bytes(stream.getvalue())
    rows = {row["file_name"]: row for row in curate(cars, quiet=True)}
    assert all("unreadable" in rows[f"images/{name}"]["reasons"][0] for name in ("page.jpg", "page.png"))


def test_large_pictures_keep_their_true_size_and_the_largest_copy_stays(cars):
    photo = Image.open(cars / "images" / "toy_000030.png")
    photo.resize((3000, 2400)).save(cars / "images" / "large.jpg")
    photo.resize((1900, 1520)).save(cars / "images" / "less.png")
    photo.resize((60_000, 40)).save(cars / "images" / "banner.png")
    rows = {row["file_name"]: row for row in curate(cars, quiet=True)}
    assert rows["images/less.png"]["copy_of"] == "images/large.jpg" and rows["images/large.jpg"]["keep"]
    assert rows["images/banner.png"]["reasons"][:2] == ["small (60000x40)", "aspect (60000x40)"]
    assert contact_sheet(cars, list(rows.values())).width > 96


def test_a_sheet_opens_only_files_of_the_folder(cars):
    (cars.parent / "secret.png").write_bytes((cars / "images" / "toy_000001.png").read_bytes())
    rows = [
        {"file_name": name, "reasons": ["blurred"]} for name in ("../secret.png", "/dev/zero", "images/toy_000001.png")
    ]
    sheet = contact_sheet(cars, rows)
    grey = sum(pixel == (192, 192, 192) for pixel in sheet.convert("RGB").get_flattened_data())
    assert 2 * 96 * 96 <= grey < 3 * 96 * 96
