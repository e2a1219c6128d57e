"""The crawler against a site that behaves badly on purpose, and against kill -9."""

import asyncio
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

for name in ("requests", "protego", "selectolax"):
    pytest.importorskip(name)

from carproto.config import CarprotoError  # noqa: E402
from carproto.json_lines import read_json_lines  # noqa: E402
from carproto.scrape.catalogue import crawl_car_connection, parse_links, parse_photos, parse_specs  # noqa: E402
from carproto.scrape.crawl import crawl  # noqa: E402
from carproto.scrape.data_card import export_url_list, write_data_card  # noqa: E402
from carproto.scrape.fetch import Fetcher  # noqa: E402
from carproto.scrape.google import _launch, parse_google, render_page  # noqa: E402
from carproto.scrape.image_search import search_images  # noqa: E402
from carproto.scrape.manifest import Manifest, PhotoRecord, read_manifest  # noqa: E402
from carproto.scrape.search_apis import search_commons, search_openverse  # noqa: E402
from carproto.scrape.security import check_picture, find_private  # noqa: E402
from carproto.scrape.urls import FetchError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from local_site import LocalSite, flat_png, gzip_bomb, render_car  # noqa: E402


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

GOOD = ["busy.jpg", "twice-500.jpg", "cut-once.jpg", "wrong-type.jpg", "superscript.jpg"]


@pytest.mark.parametrize("fault", GOOD)
def test_a_good_picture_arrives_intact(site, fault):
    site.tried.clear()
    start = time.monotonic()
    assert hasty().get_picture(f"{site.url}/faults/{fault}").content == render_car(fault)
    if fault == "busy.jpg":
        assert 1 <= time.monotonic() - start < 5, "Retry-After: 1 is to be honoured"


@pytest.mark.parametrize("fault", ["moved.jpg", "bomb-on-the-way.jpg", "endless-on-the-way.jpg"])
def test_a_redirect_is_followed_and_its_body_is_not_read(site, fault):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert hasty().get_picture(f"{site.url}/faults/{fault}").content == render_car("/pictures/moved.jpg")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes, of 60,000 unpacked
    assert time.monotonic() - start < 0.9  # the session allows a second


def test_a_redirect_in_another_encoding_is_followed(site):
    picture = hasty().get_picture(f"{site.url}/faults/latin-location.jpg")
    assert picture.content == render_car("/pictures/\ufffd.jpg")


# A bad one ends in an error that names the reason, in bounded time.

BAD = {
    "loop.jpg": ("too many redirects", True),
    "private.jpg": ("private network", True),
    "metadata.jpg": ("private network", True),
    "loopback.jpg": ("private network", True),
    "six.jpg": ("private network", True),
    "decimal.jpg": ("private network", True),
    "file.jpg": ("not a web address", True),
    "bad-location.jpg": ("not a web address", True),
    "bad-port.jpg": ("not a web address", True),
    "long-location.jpg": ("more than 8000 characters", True),
    "long-number.jpg": ("longer than", True),
    "never-unpacks.jpg": ("longer than", True),
    "gone-with-a-bomb.jpg": ("answered 404", True),
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
    "forbidden.jpg": ("answered 403", False),
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


NO_HTTP = ["two-lengths.jpg", "long-header.jpg", "many-headers.jpg", "garbage.jpg", "bad-chunk.jpg"]
NO_HTTP += ["many-encodings.jpg"]


@pytest.mark.parametrize("fault", NO_HTTP)
def test_an_answer_that_is_no_http_is_named(site, fault):
    with pytest.raises(FetchError, match="the connection was cut") as caught:
        hasty(retries=0).get_picture(f"{site.url}/faults/{fault}")
    assert not caught.value.permanent


CHARSETS = ["undefined", "idna", "%00", "utf%008", "punycode", "hex", "rot13", "unicode_escape", "\xe9", "x" * 7_000]
CHARSETS += ['"utf-8"; a=b']


@pytest.mark.parametrize("charset", CHARSETS)
def test_a_page_in_an_encoding_that_no_page_has_is_read_as_utf_8(site, charset):
    assert "Škoda" in hasty().get_text(f"{site.url}/faults/charset={charset}")


@pytest.mark.parametrize("fault", ["silent.jpg", "stall.jpg", "drip.jpg", "header-drip.jpg"])
def test_slowness_is_bounded(site, fault):
    start = time.monotonic()
    with pytest.raises(FetchError) as caught:
        hasty(retries=0).get_picture(f"{site.url}/faults/{fault}")
    assert not caught.value.permanent and time.monotonic() - start < 4


def test_a_bomb_is_not_unfolded(site):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for fault in ("bomb.png", "gzip-bomb.jpg", "endless.jpg", "never-unpacks.jpg", "gone-with-a-bomb.jpg"):
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


def test_an_exemption_holds_for_the_address_and_port_that_were_private_at_the_start(site, monkeypatch):
    with LocalSite() as neighbour:
        monkeypatch.setattr(site, "elsewhere", f"{neighbour.url}/pictures/1.jpg")
        narrow, wide = hasty(allow_private=[f"{site.url}/cars"]), hasty(allow_private=["127.0.0.1"])
        assert narrow.get_picture(f"{site.url}/pictures/1.jpg").content == render_car("/pictures/1.jpg")
        for url in (f"{site.url}/faults/other-port.jpg", f"{neighbour.url}/pictures/1.jpg"):
            with pytest.raises(FetchError, match="private network"):
                narrow.get(url)
        assert not neighbour.log
        assert wide.get_picture(f"{site.url}/faults/other-port.jpg").content == render_car("/pictures/1.jpg")

    real, address = socket.getaddrinfo, "93.184.215.14"

    def resolve(host, port, *args, **options):
        if host != "cars.example":
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    public = hasty(allow_private=[f"http://cars.example:{site.port}"])
    address = "127.0.0.1"
    private = hasty(allow_private=[f"http://cars.example:{site.port}"])
    with pytest.raises(FetchError, match="private network"):
        public.get(f"http://cars.example:{site.port}/pictures/1.jpg")
    assert private.get(f"http://cars.example:{site.port}/pictures/1.jpg")[1] == render_car("/pictures/1.jpg")


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


def test_a_proxy_reaches_no_private_address(site, monkeypatch):
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.delenv("no_proxy", raising=False)
    asked = sum(site.log.values())
    with pytest.raises(FetchError, match="private network"):
        hasty(allow_private=False).get("http://10.0.0.1/pictures/1.jpg", obey_robots=False)
    assert sum(site.log.values()) == asked
    fetcher = hasty(retries=0, allow_private=["cars.invalid"])
    assert fetcher.get("http://cars.invalid/pictures/1.jpg", obey_robots=False)[1] == render_car("/pictures/1.jpg")


def test_a_host_that_refuses_often_is_left_alone(site, monkeypatch):
    monkeypatch.setattr("carproto.scrape.hosts._MAX_REFUSALS", 3)
    fetcher, reasons = hasty(), []
    for _ in range(4):
        with pytest.raises(FetchError) as caught:
            fetcher.get_picture(f"{site.url}/faults/forbidden.jpg")
        reasons.append(caught.value.reason)
    assert reasons == ["the server answered 403"] * 3 + ["left alone, the host refused 3 times in a row"]


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


def test_forbidden_paths_are_not_requested(site):
    with pytest.raises(FetchError, match="robots.txt"):
        hasty().get(f"{site.url}/private/2.jpg")
    assert "/private/2.jpg" not in site.log


@pytest.mark.parametrize("pause, asked", [("1e30", "1e+30"), ("86400", "86400"), ("9" * 300, "1e+300")])
def test_a_site_that_asks_for_too_long_a_pause_is_left(tmp_path, pause, asked):
    with LocalSite() as site, LocalSite() as other:
        site.robots = f"User-agent: *\nCrawl-delay: {pause}\n"
        records = [PhotoRecord(f"{server.url}/pictures/{i}.jpg") for i in range(3) for server in (site, other)]
        start = time.monotonic()
        summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
        assert time.monotonic() - start < 3 and site.log == {"/robots.txt": 1}
    assert summary.saved == 3 and summary.failed == {f"the site asks for {asked} s between two requests": 3}


@pytest.mark.parametrize("pause", ["nan", "inf", "-5", "²", "0", "1" + "0" * 400])
def test_a_pause_that_is_no_number_is_none(pause):
    with LocalSite() as site:
        site.robots = f"User-agent: *\nCrawl-delay: {pause}\n"
        start = time.monotonic()
        hasty().get(f"{site.url}/pictures/1.jpg")
        assert time.monotonic() - start < 2


def test_rules_that_multiply_are_read_in_time():
    agents, rules = ("".join(f"{kind}{i}\n" for i in range(12_000)) for kind in ("User-agent: a", "Disallow: /"))
    with LocalSite() as site:
        site.robots = f"{agents}{rules}\nUser-agent: *\nDisallow: /private/\n"
        fetcher, start = hasty(total_timeout=5), time.monotonic()
        fetcher.get(f"{site.url}/pictures/1.jpg")
        with pytest.raises(FetchError, match="robots.txt"):
            fetcher.get(f"{site.url}/private/1.jpg")
        assert time.monotonic() - start < 5


# A crawl.


SLOW = ["silent.jpg", "stall.jpg", "drip.jpg", "header-drip.jpg"]


def test_every_address_is_accounted_for(site, tmp_path):
    site.tried.clear()
    site.log.clear()
    host = f"HTTP://127.0.0.1:{site.port}"
    spellings = [
        "pictures/a.jpg",
        "/pictures/../pictures/a.jpg#x",
        "/pictures/%61.jpg",
        f"{host}/x/%2e%2e/pictures/a.jpg",
    ]
    good = [f"/pictures/{i}.jpg" for i in range(6)] + [
        f"/faults/{fault}" for fault in ("twice-500.jpg", "wrong-type.jpg", "busy.jpg")
    ]
    good += ["/pictures/t%20%C3%BC.jpg"]
    escaped = ["/pictures/t ü.jpg", "/pictures/t%20%c3%bc.jpg"]
    bad = {f"/faults/{fault}": expected for fault, expected in BAD.items() if fault != "away.jpg"}
    bad |= {f"/faults/{fault}": ("no answer in time", False) for fault in SLOW} | {
        "/a/../private/1.jpg": ("robots.txt", True)
    }
    records = [PhotoRecord(url, page=f"{site.url}/", licence="CC0") for url in [*spellings, *good, *escaped, *bad]]
    records += [PhotoRecord("", page=f"{site.url}/nameless"), PhotoRecord("ftp://a.example/1.jpg")]
    records.append(FetchError("no photos on the page", f"{site.url}/p"))
    random.Random(0).shuffle(records)
    summary = crawl(records, tmp_path / "cars", hasty(retries=2), quiet=True)
    rows = {row["url"].removeprefix(site.url): row for row in read_manifest(tmp_path / "cars")}
    assert set(rows) == {"/pictures/a.jpg", *good} and summary.saved == len(rows)
    assert summary.saved + summary.repeated + summary.n_failed == len(records) and summary.repeated == 3 + 2
    assert site.log["/pictures/a.jpg"] == site.log["/pictures/t%20%C3%BC.jpg"] == 1 and "/private/1.jpg" not in site.log
    for row in rows.values():
        content = (tmp_path / "cars" / row["file_name"]).read_bytes()
        assert (
            sha256(content).hexdigest() == row["sha256"]
            and len(content) == row["bytes"]
            and row["licence"] == "CC0"
            and row["page"]
        )
    errors = {row["url"].removeprefix(site.url): row for row in read_json_lines(tmp_path / "cars" / "errors.jsonl")[0]}
    bad["/private/1.jpg"] = bad.pop("/a/../private/1.jpg")
    assert set(errors) == {*bad, "/nameless", "ftp://a.example/1.jpg", "/p"} and sum(summary.failed.values()) == len(
        errors
    )
    assert {url: (expected[0] in errors[url]["reason"], errors[url]["permanent"]) for url, expected in bad.items()} == {
        url: (True, e[1]) for url, e in bad.items()
    }
    site.log.clear()
    again = crawl(records, tmp_path / "cars", hasty(retries=0), quiet=True)
    assert (
        again.saved == 0
        and again.known == len(rows)
        and again.given_up == sum(permanent for _, permanent in bad.values())
    )
    assert set(site.log) == {"/robots.txt"} | {url for url, (_, permanent) in bad.items() if not permanent}
    assert f"CC0 | {len(rows)}" in write_data_card(tmp_path / "cars").read_text()


def test_whatever_escapes_from_a_picture_is_recorded(site, tmp_path, monkeypatch):
    real = check_picture

    def fail(content, **options):
        if content == render_car("/pictures/odd-1.jpg"):
            raise RecursionError("nested too deep")
        return real(content, **options)

    monkeypatch.setattr("carproto.scrape.fetch.check_picture", fail)
    records = [PhotoRecord(f"{site.url}/pictures/odd-{i}.jpg") for i in range(4)] + [PhotoRecord(7), PhotoRecord(["x"])]
    summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    assert summary.saved == 3 and summary.n_failed == 3
    errors = {row["url"]: row for row in read_json_lines(tmp_path / "cars" / "errors.jsonl")[0]}
    caught = errors[f"{site.url}/pictures/odd-1.jpg"]
    assert caught["reason"] == "unforeseen RecursionError (nested too deep)" and caught["permanent"] is False
    assert "unforeseen TypeError" in errors["7"]["reason"] and "unforeseen AttributeError" in errors["['x']"]["reason"]


def test_whatever_escapes_from_a_page_is_recorded(site, tmp_path, monkeypatch):
    def fail(page):
        raise error

    monkeypatch.setattr("carproto.scrape.catalogue.parse_specs", fail)
    points = {"makes": ["Volvo"], "base_url": site.url, "image_url": f"{site.url}/img/", "quiet": True}
    error = MemoryError("no more")
    summary = crawl_car_connection(tmp_path / "cars", fetcher=hasty(), **points)
    assert summary.saved == 12 and summary.failed == {"unforeseen MemoryError (no more)": 3}
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        crawl_car_connection(tmp_path / "more", fetcher=hasty(), **points)


HOSTILE_PAGES = {
    "nested": ("<div>" * 390_000, "more than 100 elements within each other"),
    "long": ("<p>" * 700_000, "longer than 2000000 bytes"),
    "slashes": ("/" * 1_900_000, "on the page, it may have changed"),
    "digits": (f"<a id=a_bc_1>Audi</a><a id=a_bc_3>{'9' * 400}</a><span class=msrp>${'9' * 400}</span>", None),
}


@pytest.mark.parametrize("fault", HOSTILE_PAGES)
def test_a_hostile_page_of_facts_stops_nothing(tmp_path, fault):
    page, reason = HOSTILE_PAGES[fault]
    with LocalSite() as site:
        site.specifications = lambda make, model, year: page
        start = time.monotonic()
        fetcher = hasty(max_bytes=30_000_000, total_timeout=5)
        points = {"makes": ["Volvo"], "base_url": site.url, "image_url": f"{site.url}/img/"}
        summary = crawl_car_connection(tmp_path / "cars", fetcher=fetcher, quiet=True, **points)
        assert summary.saved == 12 and time.monotonic() - start < 15
    expected = [reason] * 3 if reason else []
    assert [part in why for why, part in zip(summary.failed.elements(), expected)] == [True] * summary.n_failed
    assert summary.n_failed == len(expected)
    assert all("year" not in row or row["year"] is None for row in read_manifest(tmp_path / "cars"))


DEEP = ["[" * 100_000, '{"query":' * 100_000, '{"query": {"pages": [' + "[" * 900 + "]" * 900 + "]}}"]


@pytest.mark.parametrize("answer", DEEP)
def test_a_hostile_answer_of_one_service_leaves_the_other(tmp_path, answer):
    with LocalSite() as site:
        site.commons = lambda query: answer
        results = list(search_images("concept car", fetcher=hasty(), base_url=site.url))
    assert sum(isinstance(result, PhotoRecord) for result in results) == 45
    assert 1 <= sum(isinstance(result, FetchError) for result in results) <= 2


def test_a_search_without_end_ends(monkeypatch):
    monkeypatch.setattr("carproto.scrape.search_apis._MAX_ANSWERS", 5)
    with LocalSite() as site:
        whole = site.commons
        more = {"continue": {"gsroffset": 50}}

        def commons(query):
            more["continue"]["gsroffset"] += 1
            return json.dumps(json.loads(whole({**query, "gsroffset": ["0"]})) | more)

        site.commons = commons
        results = list(search_images("car", source="commons", fetcher=hasty(), base_url=site.url))
        assert sum(site.log.values()) == 6
    assert "goes on after 5 answers" in results[-1].reason


def test_half_characters_do_no_harm(site, tmp_path):
    records = [
        PhotoRecord(f"{site.url}/pictures/half.jpg", title="car \ud83d", page="\udc80"),
        PhotoRecord(f"{site.url}/\ud800.jpg"),
    ]
    for known in (0, 1):
        summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
        assert (summary.saved, summary.known) == (1 - known, known) and summary.n_failed + summary.given_up == 1
    assert [row["title"] for row in read_manifest(tmp_path / "cars")] == ["car \ud83d"]
    write_data_card(tmp_path / "cars")
    for name in ("list.csv", "list.jsonl"):
        export_url_list(tmp_path / "cars", tmp_path / name)
        assert "half.jpg" in (tmp_path / name).read_text()


def test_a_site_that_goes_down_is_gone_on_with(tmp_path):
    with LocalSite() as first:
        records = [PhotoRecord(f"{first.url}/pictures/{i}.jpg") for i in range(40)]
        half = crawl(records[:20], tmp_path / "cars", hasty(retries=0), quiet=True)
    down = crawl(records, tmp_path / "cars", hasty(retries=0), quiet=True)
    assert (half.saved, down.known, down.n_failed) == (20, 20, 20)
    with LocalSite(port=first.port):
        rest = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    assert (rest.saved, rest.known, rest.n_failed) == (20, 20, 0)
    assert [row["url"] for row in read_manifest(tmp_path / "cars")] == [record.url for record in records]
    with pytest.raises(CarprotoError, match="refuses connections"):
        crawl_car_connection(tmp_path / "none", base_url=first.url, fetcher=hasty(retries=0), quiet=True)


class FullFile:
    """A file on a disk that fills up: half of the line that is too much is written."""

    def __init__(self, file, n_lines: int):
        self.file, self.n_left = file, n_lines

    def write(self, line: str) -> None:
        self.n_left -= 1
        self.file.write(line if self.n_left >= 0 else line[: len(line) // 2])
        self.file.flush()
        if self.n_left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("what", ["picture", "line", "sync", "page"])
def test_a_full_disk_stops_the_crawl_and_loses_nothing(site, tmp_path, monkeypatch, what):
    def fill(real, n_left=5, wanted=""):
        def write(target, *args):
            nonlocal n_left
            n_left -= wanted in str(target)
            if n_left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(target, *args)

        return write

    records, cars = [PhotoRecord(f"{site.url}/pictures/full-{i}.jpg") for i in range(20)], tmp_path / "cars"
    opened = Manifest.__init__

    def open_full(self, folder):
        opened(self, folder)
        self._files["metadata"] = FullFile(self._files["metadata"], 5)

    with monkeypatch.context() as patch, pytest.raises(CarprotoError, match="No space left"):
        if what == "picture":
            patch.setattr(Path, "write_bytes", fill(Path.write_bytes))
        elif what == "line":
            patch.setattr(Manifest, "__init__", open_full)
        else:
            patch.setattr(os, "fsync", fill(os.fsync, n_left=0))
        if what == "page":
            crawl_car_connection(cars, base_url=site.url, fetcher=hasty(cache_dir=cars / ".cache"), quiet=True)
        crawl(records, cars, hasty(), quiet=True)
    crawl(records, cars, hasty(), quiet=True)
    assert sorted(row["url"] for row in read_manifest(cars)) == sorted(record.url for record in records)
    assert len(list((cars / "images").iterdir())) == 20


def test_pictures_that_a_power_cut_shortened_are_fetched_anew(site, tmp_path):
    records = [PhotoRecord(f"{site.url}/pictures/cut-{i}.jpg") for i in range(6)]
    crawl(records, tmp_path / "cars", hasty(), quiet=True)
    paths = [tmp_path / "cars" / row["file_name"] for row in read_manifest(tmp_path / "cars")]
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(b"")
    paths[2].write_bytes(whole[2][:700])
    paths[4].unlink()
    site.log.clear()
    summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    assert (summary.saved, summary.known, sum(site.log.values())) == (3, 3, 4)
    assert [path.read_bytes() for path in paths] == whole and len(read_manifest(tmp_path / "cars")) == 6


def test_the_bar_tells_rate_errors_and_time_left(site, tmp_path, capsys):
    records = [PhotoRecord(f"{site.url}/pictures/bar-{i}.jpg") for i in range(8)] + [
        PhotoRecord(f"{site.url}/faults/gone.jpg")
    ]
    crawl(records, tmp_path / "cars", hasty(delay=0.1))
    bars = capsys.readouterr().err.split("\r")
    assert "9/9" in bars[-1] and "errors=1" in bars[-1]
    assert any(re.search(r"\d+/9 \[\d+:\d+<\d+:\d+, +[\d.]+(picture/s|s/picture)", bar) for bar in bars)


def damage(value, dice: random.Random):
    """Change one thing in an answer: a field goes, or becomes something else."""
    if isinstance(value, str):
        cut = sorted(dice.randrange(len(value) + 1) for _ in range(2))
        return dice.choice(
            [
                value[: cut[0]] + value[cut[1] :],
                value[: cut[1]],
                value[: cut[0]] + dice.choice('"<\\\0[{') + value[cut[0] :],
            ]
        )
    if not isinstance(value, (dict, list)) or not value or dice.random() < 0.1:
        return dice.choice([None, "", 7, [], {}, [None], "text", {"a": 1}])
    value = value.copy()
    position = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if dice.random() < 0.2:
        del value[position]
    else:
        value[position] = damage(value[position], dice)
    return value


def test_parsers_survive_damaged_pages(site):
    dice = random.Random(0)
    pages = [site.car_pages(path) for path in ("/specifications/audi_a4_2020", "/photos/audi_a4_2020", "/new-cars")] + [
        site.google()
    ]
    for _ in range(300):
        page = damage(dice.choice(pages), dice)
        parse_specs(page), parse_photos(page), parse_links(page, site.url, "a.add-zip")
        with suppress(FetchError):
            assert all(record.url for record in parse_google(page))
    answers = {
        search_commons: json.loads(site.commons({"gsrsearch": ["car"]})),
        search_openverse: json.loads(site.openverse({"q": ["car"]})),
    }
    n_parsed = 0
    for _ in range(300):
        search, answer = dice.choice(list(answers.items()))
        fetcher = hasty()
        text = json.dumps(damage(answer, dice))
        fetcher.get_text = lambda url, text=text, **options: text
        try:
            _, results = next(search("car", fetcher, site.url))
            n_parsed += len(results)
            assert all(isinstance(getattr(result, "url", None), str) for result in results)
        except FetchError:
            pass
    assert n_parsed > 1000


def test_ten_thousand_links_are_read_at_once():
    page = json.dumps([f"http://img.example/sml/car_{i % 7000}_s.jpg" for i in range(10_000)]).replace("/", "\\/")
    start = time.monotonic()
    assert len(parse_photos(page, "large")) == 7000
    assert time.monotonic() - start < 2


def test_ten_thousand_links_become_each_picture_once(site, tmp_path):
    names = [f"lot-{i}" for i in range(300)]
    links = [
        f"{site.url}/img/{name}/{photo}_{letter}.jpg"
        for photo in names
        for name, letter in zip(("sml", "med", "lrg"), "sml")
    ]
    page = json.dumps((links * 12)[:10_000]).replace("/", "\\/")
    site.log.clear()
    results = parse_photos(page, "small")
    records = [PhotoRecord(url) for url in results + [link for link in links * 33 if "/sml/" in link]]
    patient = hasty(retries=0, read_timeout=20, total_timeout=60)  # a retry after a timeout is no second fetch
    summary = crawl(records, tmp_path / "cars", patient, quiet=True)
    assert len(results) == 300 and (summary.saved, summary.repeated, summary.n_failed) == (300, 9900, 0)
    assert site.log == {"/robots.txt": 1, **{f"/img/sml/{name}_s.jpg": 1 for name in names}}


def test_a_late_answer_is_asked_for_again_and_saved_once(site, tmp_path):
    site.tried.clear()
    records = [PhotoRecord(f"{site.url}/faults/late-once.jpg")] * 20
    summary = crawl(records, tmp_path / "cars", hasty(), quiet=True)
    assert (summary.saved, summary.repeated, summary.n_failed) == (1, 19, 0)
    assert site.tried["late-once.jpg"] == 2 and len(read_manifest(tmp_path / "cars")) == 1


def test_memory_stays_flat(site, tmp_path):
    def records(first: int, n: int):
        yield from (PhotoRecord(f"{site.url}/img/lrg/many-{i}_l.jpg") for i in range(first, first + n))

    crawl(records(0, 60), tmp_path / "cars", hasty(), quiet=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = crawl(records(60, 160), tmp_path / "cars", hasty(), quiet=True)
    assert summary.saved == 160
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes; decoded they are 800 each


# Kill -9. A single-threaded parent imports once and forks a crawler for each job that it reads.
# It reaps the child only at the next line, so that a child that is killed is still there, if only as a zombie.

PARENT = """
import json, os, sys
import protego, requests, selectolax.lexbor
from carproto.scrape.fetch import Fetcher
from carproto.scrape.catalogue import crawl_car_connection
for line in sys.stdin:
    folder, url = json.loads(line)
    child = os.fork()
    if not child:
        fetcher = Fetcher(delay=0.002, cache_dir=folder + "/.cache", allow_private=True)
        addresses = {"base_url": url, "image_url": f"{url}/img/"}
        crawl_car_connection(folder, picture_size="small", fetcher=fetcher, quiet=True, **addresses)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)  # the teardown of the imported libraries takes seconds on a busy machine
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_nine_changes_nothing(tmp_path):
    with LocalSite(n_photos=4) as site:
        folder, whole = tmp_path / "cars", tmp_path / "undisturbed"
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

        def run(target: Path, kill_after: int | None, disturb=None) -> int:
            "Exit status of one crawl, killed after `kill_after` requests; it stands still while `disturb` is called"
            n_before = sum(site.log.values())
            parent.stdin.write(json.dumps([str(target), site.url]) + "\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            if kill_after is not None:
                patience = time.monotonic() + 20
                while sum(site.log.values()) < n_before + kill_after and time.monotonic() < patience:
                    time.sleep(0.001)
                if disturb:
                    os.kill(child, signal.SIGSTOP)
                    disturb()
                time.sleep(dice.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
            parent.stdin.write("\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        def crawl_too() -> None:
            with pytest.raises(CarprotoError, match="another crawl or curation is writing"):
                crawl([PhotoRecord(f"{site.url}/pictures/1.jpg")], folder, hasty(), quiet=True)

        settled, dice = {}, random.Random(time.time_ns())
        assert run(folder, 1, crawl_too) == -signal.SIGKILL
        assert "/pictures/1.jpg" not in site.log
        for _ in range(10):
            assert run(folder, dice.randint(0, 6)) == -signal.SIGKILL
            images = {path.stem for path in folder.glob("images/*") if not path.name.startswith(".")}
            pages = {
                json.loads(path.read_text())["url"]
                for path in folder.glob(".cache/*.json")
                if not path.name.startswith(".")
            }
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
        errors = [
            [(row["url"], row["reason"]) for row in read_json_lines(target / "errors.jsonl")[0]]
            for target in (folder, whole)
        ]
        assert errors[0] == errors[1] and len(errors[0]) == 2


def test_an_interrupt_stops_soon_and_can_be_resumed(site, tmp_path):
    def records():
        yield from (PhotoRecord(f"{site.url}/pictures/int-{i}.jpg") for i in range(20))
        raise KeyboardInterrupt

    fetcher = hasty(delay=0.2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        crawl(records(), tmp_path / "cars", fetcher, quiet=True)
    assert time.monotonic() - start < 3
    rest = [PhotoRecord(f"{site.url}/pictures/int-{i}.jpg") for i in range(20)]
    assert crawl(rest, tmp_path / "cars", hasty(), quiet=True).saved > 0
    assert len(read_manifest(tmp_path / "cars")) == 20


def test_pages_survive_a_dead_photo_server(site, tmp_path):
    summary = crawl_car_connection(
        tmp_path / "cars",
        makes=["Volvo"],
        base_url=site.url,
        image_url="http://127.0.0.1:9/",
        fetcher=hasty(retries=0),
        quiet=True,
    )
    assert summary.saved == 0 and sum(summary.failed.values()) == 12
    assert read_manifest(tmp_path / "cars") == []


# The commands, from the web to a curated folder.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BIN = Path(sys.executable).parent


def scrape(*arguments: str) -> int:
    """Run `carproto scrape` within this process."""
    return pytest.importorskip("carproto.app.cli").main(["scrape", *map(str, arguments)])


def test_scrape_and_curate_as_console_commands(site, tmp_path):
    def run(*line: str) -> str:
        done = subprocess.run([BIN / "carproto", *line], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-800:]
        return done.stdout

    site.agents.clear()
    points = ["--base_url", site.url, "--image_url", f"{site.url}/img/", "--delay", "0"]
    line = [
        "scrape",
        "car-connection",
        "--folder",
        "cars",
        "--makes",
        "Audi",
        "BMW",
        "--contact",
        "me@example.org",
        *points,
    ]
    printed = run(*line, "--url_list", "cars.csv")
    assert (
        "32 new pictures" in printed
        and "img2dataset --url_list cars.csv" in printed
        and "carproto curate cars" in printed
    )
    assert "Audi | 24" in (tmp_path / "cars" / "DATA_CARD.md").read_text() and all(
        "me@example.org" in agent for agent in site.agents
    )
    assert len((tmp_path / "cars.csv").read_text().splitlines()) == 1 + 32
    urls = {row["url"] for row in read_manifest(tmp_path / "cars")}
    assert run("curate", "cars")
    rows = read_manifest(tmp_path / "cars")
    assert (
        len(rows) == 32
        and {row["url"] for row in rows} == urls
        and all(isinstance(row["keep"], bool) and row["sha256"] for row in rows)
    )
    assert "| kept |" in write_data_card(tmp_path / "cars").read_text()


def test_scrape_searches_and_lists(site, tmp_path, capsys):
    search = ["search", "--base_url", site.url, "--delay", 0, "--query", "concept car", "car of tomorrow"]
    assert scrape(*search, "--folder", tmp_path / "found", "--limit", 30) == 0
    rows = read_manifest(tmp_path / "found")
    assert len(rows) == 30 and {row["query"] for row in rows} == {"concept car", "car of tomorrow"}
    assert {row["source"] for row in rows} == {"Wikimedia Commons", "Openverse (flickr)"} and all(
        row["licence"] and row["author"] for row in rows
    )
    asked = site.log.copy()
    addresses = tmp_path / "list.jsonl"
    assert scrape(*search, "--folder", tmp_path / "listed", "--limit", 8, "--list_only", "--url_list", addresses) == 0
    assert len(read_json_lines(addresses)[0]) == 8 and not any("/pictures/" in path for path in site.log - asked)
    capsys.readouterr()
    for line, expected in {
        ("elsewhere",): "choose car-connection or search",
        ("search", "--list_only"): "--url_list",
        ("search", "--engine", "bing"): "choose from commons, openverse, google",
        ("search", "--contact", "a\nb"): "no address",
        (*search, "--engine", "google"): "robots.txt keeps crawlers out; save the result page",
        ("car-connection", "--delay", "0", "--base_url", "http://192.0.2.1.invalid/"): "the host has no address",
    }.items():
        assert scrape(*line, "--folder", tmp_path / "none") == 2
        assert expected in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_google_through_a_real_browser(site, tmp_path, capsys):
    pytest.importorskip("playwright.sync_api")
    line = ["search", "--engine", "google", "--browser", CHROMIUM, "--delay", 0, "--folder", tmp_path / "found"]
    assert scrape(*line, "--base_url", site.url) == 0
    titles = [row["title"] for row in read_manifest(tmp_path / "found")]
    assert len(titles) == 15 and titles.count("Later car") == 2, "scrolling makes two more appear"
    assert scrape(*line, "--base_url", f"{site.url}/captcha") == 2
    assert "answered 429, it asks for a captcha; save the result page" in capsys.readouterr().err


PRYING = """<html><body><img src="{far}/img"><iframe src="{far}/frame"></iframe>
<iframe src="{near}/faults/other-port.jpg"></iframe>
<link rel="preconnect" href="{far}/"><script>fetch("{far}/fetch", {{mode: "no-cors"}}).catch(() => 0);
new WebSocket("{far}/socket".replace("http", "ws"));
navigator.sendBeacon("{far}/beacon", "x"); open("{far}/window");</script><h1>Drawn by a script: <b id=b></b></h1>
<script>fetch("/pictures/1.jpg").then(answer => b.textContent = answer.status)</script></body></html>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_in_the_browser_reaches_no_neighbour():
    pytest.importorskip("playwright.async_api")
    with LocalSite() as site, LocalSite() as neighbour:
        hanging = "<p>a<script>setTimeout(() => {while (1);}, 50)</script>"
        pages = {"/pry": PRYING.format(far=neighbour.url, near=site.url), "/hang": hanging}
        site.car_pages, site.elsewhere = pages.get, f"{neighbour.url}/redirect"
        allowed = find_private([site.url])
        page = render_page(f"{site.url}/pry", browser=CHROMIUM, allowed=allowed)
        assert 'script: <b id="b">200</b>' in page, "what is exempt is reached"
        assert site.log["/faults/other-port.jpg"] == 1 and not neighbour.log
        with pytest.raises(FetchError, match="private network"):
            render_page(f"{site.url}/pry", browser=CHROMIUM)
        start = time.monotonic()
        with pytest.raises(FetchError, match="not ready after 4 s"):
            render_page(f"{site.url}/hang", browser=CHROMIUM, allowed=allowed, total_timeout=4)
        assert time.monotonic() - start < 40


def test_the_browser_runs_in_its_sandbox_where_there_is_one():
    playwright = pytest.importorskip("playwright.async_api")

    class Chromium:
        def __init__(self, *errors: str):
            self.errors, self.asked = list(errors), []

        async def launch(self, **options):
            self.asked.append(options["chromium_sandbox"])
            if self.errors:
                raise playwright.Error(self.errors.pop())
            return "browser"

    sandboxed = Chromium()
    assert asyncio.run(_launch(sandboxed, "http://127.0.0.1:1", None)) == "browser" and sandboxed.asked == [True]
    root = Chromium("Running as root without --no-sandbox is not supported")
    with pytest.warns(UserWarning, match="no sandbox here"):
        assert asyncio.run(_launch(root, "http://127.0.0.1:1", None)) == "browser"
    assert root.asked == [True, False]
    broken = Chromium("a library is missing")
    with pytest.raises(playwright.Error, match="a library is missing"):
        asyncio.run(_launch(broken, "http://127.0.0.1:1", None))
    assert broken.asked == [True]


def test_google_says_no_in_many_ways(site):
    pages = {
        name: hasty(retries=0, delay=0)._session.get(f"{site.url}/{name}/search").text
        for name in ("captcha", "consent", "recipe")
    }
    for name, meaning in {
        "captcha": "asks for a captcha",
        "consent": "consent to cookies",
        "recipe": "its form has changed",
    }.items():
        with pytest.raises(FetchError, match=meaning):
            parse_google(pages[name])
    with pytest.raises(CarprotoError, match="answered 429; save the result page"):
        fetcher = hasty(retries=0)
        fetcher._check_robots = lambda url: None
        list(search_images("car", source="google", fetcher=fetcher, base_url=f"{site.url}/captcha"))


def test_a_missing_browser_is_named(site, monkeypatch):
    with pytest.raises(CarprotoError, match="there is no browser at /nowhere"):
        render_page(f"{site.url}/search", browser="/nowhere")
    monkeypatch.setitem(sys.modules, "playwright.async_api", None)
    with pytest.raises(CarprotoError, match=r"pip install 'carproto\[browser\]' && playwright install chromium"):
        render_page(f"{site.url}/search")
