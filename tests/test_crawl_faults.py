"""The crawler against a site that behaves badly on purpose, and against kill -9."""

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

for name in ("requests", "protego", "selectolax"):
    pytest.importorskip(name)

from carproto.core import CarprotoError  # noqa: E402
from carproto.crawl import Record, crawl, read_manifest, write_data_card  # noqa: E402
from carproto.fetch import Fetcher  # noqa: E402
from carproto.guard import FetchError  # noqa: E402
from carproto.manifest import read_lines  # noqa: E402
from carproto.sources import crawl_car_connection, read_photos  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from local_site import LocalSite, draw_car, flat_png, gzip_bomb  # noqa: E402


@pytest.fixture(scope="module")
def site():
    flat_png(20_000, 20_000), gzip_bomb(60_000_000)
    with LocalSite() as site:
        yield site


def hasty(**options) -> Fetcher:
    """A fetcher with short patience, for this machine only."""
    return Fetcher(
        **{
            "delay": 0,
            "retries": 2,
            "backoff": 0.02,
            "connect_timeout": 1,
            "read_timeout": 0.4,
            "total_timeout": 1,
            "max_bytes": 1_000_000,
            "allow_private": ["127.0.0.1"],
            **options,
        }
    )


# A good picture arrives, whatever happens on its way.

GOOD = ["busy.jpg", "twice-500.jpg", "cut-once.jpg", "wrong-type.jpg"]


@pytest.mark.parametrize("fault", GOOD)
def test_a_good_picture_arrives_intact(site, fault):
    site.tried.clear()
    start = time.monotonic()
    assert hasty().get_picture(f"{site.url}/faults/{fault}").content == draw_car(fault)
    if fault == "busy.jpg":
        assert 1 <= time.monotonic() - start < 5, "Retry-After: 1 is to be honoured"


def test_a_redirect_is_followed(site):
    assert hasty().get_picture(f"{site.url}/faults/moved.jpg").content == draw_car("/pictures/moved.jpg")


# A bad one ends in an error that names the reason, in bounded time.

BAD = {
    "loop.jpg": ("too many redirects", True),
    "private.jpg": ("private network", True),
    "metadata.jpg": ("private network", True),
    "loopback.jpg": ("private network", True),
    "six.jpg": ("private network", True),
    "decimal.jpg": ("private network", True),
    "file.jpg": ("not a web address", True),
    "closed-door.jpg": ("robots.txt", True),
    "always-500.jpg": ("answered 500", False),
    "away.jpg": ("answered 429", False),
    "cut.jpg": ("cut", False),
    "cut-silently.jpg": ("truncated", False),
    "endless.jpg": ("longer than", True),
    "huge.jpg": ("longer than", True),
    "gzip-bomb.jpg": ("longer than", True),
    "page.jpg": ("not a picture but a web page", True),
    "empty.jpg": ("0 bytes", False),
    "bomb.png": ("too many pixels", True),
    "dot.png": ("too few", True),
    "forbidden.jpg": ("answered 403", True),
    "gone.jpg": ("answered 404", True),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_is_named(site, fault):
    reason, permanent = BAD[fault]
    site.tried.clear()
    start = time.monotonic()
    with pytest.raises(FetchError) as caught:
        hasty().get_picture(f"{site.url}/faults/{fault}")
    assert reason in caught.value.reason and caught.value.permanent is permanent
    assert time.monotonic() - start < 5
    assert site.tried[fault] == {"loop.jpg": 6, "always-500.jpg": 3, "cut.jpg": 3}.get(fault, 1)


@pytest.mark.parametrize("fault", ["silent.jpg", "stall.jpg", "drip.jpg", "header-drip.jpg"])
def test_slowness_is_bounded(site, fault):
    start = time.monotonic()
    with pytest.raises(FetchError) as caught:
        hasty(retries=0).get_picture(f"{site.url}/faults/{fault}")
    assert not caught.value.permanent and time.monotonic() - start < 4


def test_a_bomb_is_not_unfolded(site):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for fault in ("bomb.png", "gzip-bomb.jpg", "endless.jpg"):
        with pytest.raises(FetchError):
            hasty().get_picture(f"{site.url}/faults/{fault}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kilobytes


def test_a_name_that_changes_its_address_is_caught(site, monkeypatch):
    real, answers = socket.getaddrinfo, [["93.184.215.14"], ["127.0.0.1"], ["93.184.215.14", "127.0.0.1"]]

    def resolve(host, port, *args, **options):
        if host != "rebind.example":
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    asked = sum(site.log.values())
    for _ in range(2):
        with pytest.raises(FetchError, match="private network"):
            hasty(allow_private=False)._request(f"http://rebind.example:{site.port}/pictures/1.jpg")
    assert not answers and sum(site.log.values()) == asked


def test_a_dead_host_is_left_alone():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    fetcher, reasons = hasty(retries=0), []
    for i in range(12):
        with pytest.raises(FetchError) as caught:
            fetcher.get(f"{url}{i}", obey_robots=False)
        reasons.append(caught.value.reason)
    assert "refuses" in reasons[0] and "left alone" in reasons[-1]


# Manners.


def test_requests_to_one_host_keep_their_distance(site):
    fetcher = hasty(delay=0.15, contact="mailto:someone@example.org")
    site.times.clear()
    site.agents.clear()
    threads = [threading.Thread(target=fetcher.get_picture, args=(f"{site.url}/pictures/{i}.jpg",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = [later - earlier for earlier, later in zip(site.times, site.times[1:])]
    assert len(gaps) == 5 and sum(gaps) > 0.6
    assert all(agent.startswith("carproto/") and "someone@example.org" in agent for agent in site.agents)


def test_a_busy_host_is_left_alone_by_all(site):
    site.tried.clear()
    fetcher = hasty()
    with pytest.raises(FetchError):
        fetcher.get(f"{site.url}/faults/away.jpg")
    with pytest.raises(FetchError, match="stay away"):
        fetcher.get(f"{site.url}/pictures/1.jpg")


def test_closed_doors_are_not_knocked_at(site):
    with pytest.raises(FetchError, match="robots.txt"):
        hasty().get(f"{site.url}/private/2.jpg")
    assert "/private/2.jpg" not in site.log


# A crawl.


def test_every_address_is_accounted_for(site, tmp_path):
    site.tried.clear()
    site.log.clear()
    spellings = ["/pictures/a.jpg", "/pictures/../pictures/a.jpg#x", "pictures/a.jpg", f"HTTP://127.0.0.1:{site.port}/pictures/a.jpg"]
    good = [f"/pictures/{i}.jpg" for i in range(6)] + ["/faults/twice-500.jpg", "/faults/wrong-type.jpg"]
    bad = {f"/faults/{fault}": expected for fault, expected in BAD.items() if fault != "away.jpg"}
    records = [Record(url, page=f"{site.url}/", licence="CC0") for url in [*spellings, *good, *bad]]
    random.Random(0).shuffle(records)
    summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    rows = {row["url"].removeprefix(site.url): row for row in read_manifest(tmp_path / "cars")}
    assert set(rows) == {"/pictures/a.jpg", *good} and summary.saved == len(rows)
    assert site.log["/pictures/a.jpg"] == 1
    for row in rows.values():
        content = (tmp_path / "cars" / row["file_name"]).read_bytes()
        assert sha256(content).hexdigest() == row["sha256"] and len(content) == row["bytes"] and row["licence"] == "CC0" and row["page"]
    errors = {row["url"].removeprefix(site.url): row for row in read_lines(tmp_path / "cars" / "errors.jsonl")[0]}
    assert {url: (expected[0] in errors[url]["reason"], errors[url]["permanent"]) for url, expected in bad.items()} == {
        url: (True, e[1]) for url, e in bad.items()
    }
    site.log.clear()
    again = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    assert again.saved == 0 and again.known == len(rows)
    assert set(site.log) == {"/robots.txt"} | {url for url, (_, permanent) in bad.items() if not permanent}
    assert "CC0 | 9" in write_data_card(tmp_path / "cars").read_text()


def test_a_full_disk_stops_the_crawl_and_loses_nothing(site, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    records = [Record(f"{site.url}/pictures/full-{i}.jpg") for i in range(20)]
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CarprotoError, match="No space left"):
        crawl(records, tmp_path / "cars", hasty(), quiet=True)
    monkeypatch.setattr(os, "fsync", real)
    crawl(records, tmp_path / "cars", hasty(), quiet=True)
    rows = read_manifest(tmp_path / "cars")
    assert [row["url"] for row in rows] == [record.url for record in records]
    assert len(list((tmp_path / "cars" / "images").iterdir())) == 20


def test_ten_thousand_links_are_read_at_once():
    page = json.dumps([f"http://img.example/sml/car_{i % 7000}_s.jpg" for i in range(10_000)]).replace("/", "\\/")
    start = time.monotonic()
    assert len(read_photos(page, "large")) == 150
    assert time.monotonic() - start < 2


def test_memory_stays_flat(site, tmp_path):
    records = (Record(f"{site.url}/pictures/many-{i}.jpg") for i in range(300))
    crawl((next(records) for _ in range(100)), tmp_path / "cars", hasty(), quiet=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert crawl(records, tmp_path / "cars", hasty(), quiet=True).saved == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes


# Kill -9. A single-threaded parent imports once and forks a crawler for each job that it reads.
# It reaps the child only at the next line, so that a child that is killed is still there, if only as a zombie.

PARENT = """
import json, os, sys
import protego, requests, selectolax.lexbor
from carproto.fetch import Fetcher
from carproto.sources import crawl_car_connection
for line in sys.stdin:
    folder, url = json.loads(line)
    child = os.fork()
    if not child:
        fetcher = Fetcher(delay=0.002, cache_dir=folder + "/.cache", allow_private=True)
        crawl_car_connection(folder, picture_size="small", base_url=url, image_url=url + "/img/", fetcher=fetcher, quiet=True)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_nine_changes_nothing(tmp_path):
    with LocalSite(n_photos=4) as site:
        folder, whole = tmp_path / "cars", tmp_path / "undisturbed"
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )

        def run(target: Path, kill_after: int | None) -> int:
            "Exit status of one crawl, killed at a random moment after `kill_after` requests"
            n_before = sum(site.log.values())
            parent.stdin.write(json.dumps([str(target), site.url]) + "\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            if kill_after is not None:
                patience = time.monotonic() + 20
                while sum(site.log.values()) < n_before + kill_after and time.monotonic() < patience:
                    time.sleep(0.001)
                time.sleep(dice.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
            parent.stdin.write("\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        settled, dice = {}, random.Random(time.time_ns())
        for _ in range(10):
            assert run(folder, dice.randint(0, 6)) == -signal.SIGKILL
            images = {path.stem for path in folder.glob("images/*") if not path.name.startswith(".")}
            pages = {json.loads(path.read_text())["url"] for path in folder.glob(".cache/*.json") if not path.name.startswith(".")}
            for path, n_asked in list(site.log.items()):
                if site.url + path in pages or sha256((site.url + path).encode()).hexdigest()[:24] in images:
                    assert settled.setdefault(path, n_asked) == n_asked, f"{path} was fetched again"
        assert run(folder, None) == 0
        assert all(site.log[path] == n_asked for path, n_asked in settled.items())
        assert run(whole, None) == 0
        parent.stdin.close()
        parent.wait(10)
        rows, expected = ([{**row, "retrieved": ""} for row in read_manifest(target)] for target in (folder, whole))
        assert len(rows) == 68 and rows == expected
        assert all(sha256((folder / row["file_name"]).read_bytes()).hexdigest() == row["sha256"] for row in rows)
        assert {path.name for path in (folder / "images").iterdir()} == {Path(row["file_name"]).name for row in rows}
        errors = [[(row["url"], row["reason"]) for row in read_lines(target / "errors.jsonl")[0]] for target in (folder, whole)]
        assert errors[0] == errors[1] and len(errors[0]) == 2


def test_an_interrupt_stops_soon_and_can_be_resumed(site, tmp_path):
    def records():
        yield from (Record(f"{site.url}/pictures/int-{i}.jpg") for i in range(20))
        raise KeyboardInterrupt

    fetcher = hasty(delay=0.2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        crawl(records(), tmp_path / "cars", fetcher, quiet=True)
    assert time.monotonic() - start < 3
    rest = [Record(f"{site.url}/pictures/int-{i}.jpg") for i in range(20)]
    assert crawl(rest, tmp_path / "cars", hasty(), quiet=True).saved > 0
    assert len(read_manifest(tmp_path / "cars")) == 20


def test_pages_survive_a_dead_photo_server(site, tmp_path):
    summary = crawl_car_connection(
        tmp_path / "cars", makes=["Volvo"], base_url=site.url, image_url="http://127.0.0.1:9/", fetcher=hasty(retries=0), quiet=True
    )
    assert summary.saved == 0 and sum(summary.failed.values()) == 12
    assert read_manifest(tmp_path / "cars") == []
