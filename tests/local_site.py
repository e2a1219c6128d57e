"""A small web site on 127.0.0.1: a car catalogue, two search APIs, a saved result page, and faults on purpose.

    with LocalSite() as site:
        crawl_car_connection(folder, base_url=site.url, ...)

Run as a program it serves until it is stopped: `python tests/local_site.py --port 8000`.
"""

import argparse
import gzip
import html
import io
import json
import random
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image, ImageDraw

CATALOGUE = {"Audi": ["A4", "Q5"], "BMW": ["i4"], "Honda": ["Civic", "Fit"], "Volvo": ["XC40"]}
YEARS = (2021, 2020, 2019)
SIZES = {"sml": ("s", (120, 80)), "med": ("m", (300, 200)), "lrg": ("l", (640, 426))}


@lru_cache(maxsize=4096)
def render_car(key: str, size: tuple[int, int] = (120, 80)) -> bytes:
    """Draw a car as a JPEG; the key decides paint, shape and ground, so that each key has a picture of its own."""
    mix = zlib.crc32(key.encode())
    width, height = size
    picture = Image.new("RGB", size, (200 + mix % 50, 205 + mix // 7 % 45, 210 + mix // 11 % 40))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, int(height * 0.7), width, height), fill=(110 + mix % 40,) * 3)
    paint = (mix >> 3 & 255, mix >> 11 & 255, mix >> 19 & 255)
    roof = 0.22 + (mix >> 5 & 15) / 100
    body = [(0.08, 0.68), (0.10, 0.5), (0.3, 0.46), (0.42, roof), (0.7, roof), (0.8, 0.47), (0.92, 0.52), (0.92, 0.68)]
    pen.polygon([(x * width, y * height) for x, y in body], fill=paint)
    pen.polygon(
        [(x * width, y * height) for x, y in [(0.35, 0.46), (0.44, roof + 0.04), (0.68, roof + 0.04), (0.76, 0.46)]],
        fill=(40, 50, 60),
    )
    for x in (0.24, 0.7):
        pen.ellipse((x * width, 0.57 * height, x * width + 0.22 * height, 0.79 * height), fill=(15, 15, 18))
    for bit in range(16):
        pen.rectangle((bit * 3, height - 3, bit * 3 + 2, height), fill=(255,) * 3 if mix >> bit & 1 else (0,) * 3)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


@lru_cache
def flat_png(width: int, height: int) -> bytes:
    """Write a black PNG of any size: a few kilobytes that unfold to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width // 8 + 2)))
    body = b"".join(rows) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


@lru_cache
def gzip_bomb(n_bytes: int) -> bytes:
    """Pack zeros: a few kilobytes that unfold to a thousand times as much."""
    return gzip.compress(bytes(n_bytes))


class QuietServer(ThreadingHTTPServer):
    """A server that does not mind when a client hangs up."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class LocalSite:
    """Serve the site from a thread; `log` counts what was asked for, `tried` how often each fault was met."""

    def __init__(self, port: int = 0, n_photos: int = 4, n_results: int = 45):
        self.n_photos, self.n_results = n_photos, n_results
        self.log, self.tried, self.lock = Counter(), Counter(), threading.Lock()
        self.agents, self.times, self.closing = set(), [], threading.Event()
        self.elsewhere = "http://127.0.0.1:1/"  # where other-port.jpg leads
        self.robots = "User-agent: *\nDisallow: /private/\nDisallow: /v1/\nDisallow: /w/\nDisallow: /search\n"
        handler = type("Handler", (_Handler,), {"site": self})
        self.server = QuietServer(("127.0.0.1", port), handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LocalSite":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def car_pages(self, path: str) -> str | None:
        """Answer for a catalogue page, with its oddities: missing fields, repeated links, a changed page."""
        link = '<li><a class="{}" href="{}">{}</a></li>'.format
        if path == "/new-cars":
            makes = [link("add-zip", f"/make/new,{make.lower()}", make) for make in CATALOGUE]
            makes += [link("add-zip", "/make/new,audi", "Audi"), link("other", "/news", "News")]
            return f"<html><body><ul>{''.join(makes)}</ul></body></html>"
        kind, _, rest = path.strip("/").partition("/")
        if kind == "make":
            make = next((make for make in CATALOGUE if make.lower() == rest.removeprefix("new,")), None)
            names = [
                f'<div class="name"><a href="/cars/{make.lower()}_{model.lower()}">{make} {model}</a>'
                '<a href="#">more</a></div>'
                for model in CATALOGUE.get(make, [])
            ]
            return f"<html><body>{''.join(names)}</body></html>" if make else None
        slug = rest.split("_")
        cars = {(make.lower(), model.lower()): (make, model) for make, models in CATALOGUE.items() for model in models}
        if len(slug) < 2 or tuple(slug[:2]) not in cars:
            return None
        make, model = cars[tuple(slug[:2])]
        if kind == "cars":
            classes = ["btn avail-now first-item"] + ["btn 1"] * (len(YEARS) - 1)
            return (
                "<html><body>"
                + "".join(link(name, f"/overview/{rest}_{year}", year) for name, year in zip(classes, YEARS))
                + "</body></html>"
            )
        year = slug[2] if len(slug) > 2 else "2020"
        if kind == "specifications":
            return self.specifications(make, model, year)
        if kind == "photos":
            return self.photos(make, model, year)
        return None

    def specifications(self, make: str, model: str, year: str) -> str:
        """Write a specifications page; the Fit of 2019 has lost its table, the Civic its price."""
        bare = (model, year) == ("Fit", "2019")
        price = "" if model == "Civic" else '<span class="msrp">$ 38,395</span>'
        rows = {
            "Front Wheel Size (in)": "17 X 7.5",
            "SAE Net Horsepower @ RPM": "188 @ 4200",
            "Displacement": "2.0 L/121",
            "Engine Type": "Turbocharged Gas I4",
            "Width, Max w/o mirrors (in)": "72.7",
            "Height, Overall (in)": "56.2",
            "Length, Overall (in)": "187.5",
            "Gas Mileage": "27 mpg City/35 mpg Hwy",
            "Drivetrain": "All Wheel Drive",
            "Passenger Capacity": "5",
            "Passenger Doors": "4",
            "Body Style": "4dr Car",
            "Transmission": "Automatic",
            "Wheelbase (in)": "111.0",
            "Base Curb Weight (lbs)": "- TBD -",
            "SAE Net Torque @ RPM": "236 @ 1450",
            "Seat Trim": "Leather &amp; cloth",
        }
        table = "".join(
            f'<div class="specs-set-item"><span class="key">{name}</span><span class="value">{value}</span></div>'
            for name, value in rows.items()
        )
        crumbs = "".join(f'<a id="a_bc_{i}" href="#"> {text} </a>' for i, text in enumerate((make, model, year), 1))
        title = f"<head><title>{year} {make} {model} Specifications</title></head>"
        return f"<html>{title}<body>{'' if bare else crumbs + price + table}</body></html>"

    def photos(self, make: str, model: str, year: str) -> str:
        """Write a photo page: escaped JSON, every photo twice; the i4 has another layout, the XC40 relative paths."""
        if (model, year) == ("i4", "2019"):
            return "<html><body><h1>Our new gallery</h1></body></html>"
        names = [f"{year}-{make}-{model}_{i:09d}".lower() for i in range(self.n_photos)]
        host = "" if model == "XC40" else f"{self.url}/img/"
        links = [
            {name: f"{host}{name}/{photo}_{letter}.jpg" for name, (letter, _) in SIZES.items()}
            for photo in names + names[:2]
        ]
        gallery = json.dumps({"images": links}).replace("/", chr(92) + "/")
        return f"<html><body><script>var gallery = {gallery};</script></body></html>"

    def count(self, term: str) -> int:
        """Say how many pictures a search finds."""
        return 0 if "nothing" in term else self.n_results

    def shift(self, term: str) -> int:
        """Say which picture a search finds first, so that two searches find some pictures both."""
        return 0 if term.startswith("concept car") else 20

    def openverse(self, query: dict) -> str:
        """Answer like the image search of Openverse."""
        page, size = int(query.get("page", ["1"])[0]), int(query.get("page_size", ["20"])[0])
        term = query["q"][0]
        n_results = self.count(term)
        results = [
            {
                "id": f"id-{i}",
                "title": f"{term} {i}",
                "foreign_landing_url": f"{self.url}/landing/{i}",
                "url": f"{self.url}/pictures/ov-{i + self.shift(term)}.jpg",
                "creator": f"Person {i % 3}",
                "license": ["by", "cc0", "by-sa"][i % 3],
                "license_version": "4.0" if i % 3 != 1 else "1.0",
                "license_url": "https://creativecommons.org/licenses/by/4.0/",
                "provider": "flickr",
                "source": "flickr",
                "width": 120,
                "height": 80,
            }
            for i in range((page - 1) * size, min(page * size, n_results))
        ]
        return json.dumps(
            {
                "result_count": n_results,
                "page_count": -(-n_results // size),
                "page_size": size,
                "page": page,
                "results": results,
            }
        )

    def commons(self, query: dict) -> str:
        """Answer like the search of Wikimedia Commons, with a drawing and a page without a file among the results."""
        if "list" in query:
            return json.dumps(
                {
                    "batchcomplete": True,
                    "query": {"searchinfo": {"totalhits": self.count(query["srsearch"][0])}, "search": []},
                }
            )
        start, size = int(query.get("gsroffset", ["0"])[0]), int(query.get("gsrlimit", ["10"])[0])
        n_results, shift, pages = self.count(query["gsrsearch"][0]), self.shift(query["gsrsearch"][0]), []
        for i in range(start, min(start + size, n_results)):
            info = {
                "url": f"{self.url}/pictures/full-{i}.jpg",
                "thumburl": f"{self.url}/pictures/co-{i + shift}.jpg",
                "mime": "image/svg+xml" if i == 3 else "image/jpeg",
                "descriptionurl": f"{self.url}/wiki/File:Concept_{i}.jpg",
                "width": 4000,
                "height": 2600,
                "extmetadata": {
                    "Artist": {"value": f'<a href="//x/User:P{i}">Ada &amp; P{i}</a>'},
                    "LicenseShortName": {"value": "CC BY-SA 4.0"},
                    "LicenseUrl": {"value": "https://creativecommons.org/licenses/by-sa/4.0"},
                },
            }
            pages.append(
                {
                    "pageid": 100 + i,
                    "ns": 6,
                    "title": f"File:Concept {i}.jpg",
                    "index": i + 1,
                    **({} if i == 5 else {"imageinfo": [info]}),
                }
            )
        answer = {"batchcomplete": True, **({"query": {"pages": pages[::-1]}} if pages else {})}
        if start + size < n_results:
            answer["continue"] = {"gsroffset": start + size, "continue": "gsroffset||"}
        return json.dumps(answer)

    def google(self, n_results: int = 12) -> str:
        """Write a result page like those of Google Images; two more results come when one scrolls."""
        records = []
        for i in range(n_results):
            url = f"{self.url}/pictures/go-{i}.jpg?w=1\\u0026h=2"
            thumb = f"https://encrypted-tbn0.gstatic.com/images?q\\u003dtbn:T{i}"
            records.append(
                f'[0,"doc{i}",["{thumb}",168,300],["{url}",720,1280],null,0,"rgb(9,9,9)",null,0,'
                '{"2000":[null,"cars.example","98KB"],'
                f'"2003":[null,"k{i}","{self.url}/article/{i}","Concept \\"{i}\\" \\u0026 friends",null,0]}}]'
            )
        anchor = html.escape(f"/imgres?imgurl={self.url}/pictures/go-anchor.jpg&imgrefurl={self.url}/article/a&h=1&w=2")
        more = (
            """
            let n = 0;
            addEventListener("scroll", () => {
                const more = `<a href="%s"><img alt="Later car"></a><p style="height:3000px"></p>`;
                if (n++ < 2) document.body.insertAdjacentHTML("beforeend", more);
            });
        """
            % f"/imgres?imgurl={self.url}/pictures/go-later-${{n}}.jpg&amp;imgrefurl={self.url}/article/later"
        )
        return (
            f"<html><body><script>var data = [{','.join(records)}];</script>"
            f'<a href="{anchor}"><img alt="Anchored car"></a>'
            f'<p style="height:3000px"></p><script>{more}</script></body></html>'
        )


class _Handler(BaseHTTPRequestHandler):
    """Answer requests; paths under /faults/ misbehave."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    site: LocalSite

    def log_message(self, *args) -> None:
        pass

    def reply(self, body: bytes | str, kind: str = "image/jpeg", status: int = 200, **headers) -> None:
        """Send a whole answer."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        site, parts = self.site, urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        with site.lock:
            site.log[self.path] += 1
            site.agents.add(self.headers.get("User-Agent"))
            site.times.append(time.monotonic())
        try:
            if path.startswith("/faults/"):
                self.misbehave(path.removeprefix("/faults/"))
            elif path == "/robots.txt":
                self.reply(site.robots, "text/plain")
            elif path.startswith(("/pictures/", "/private/")):
                self.reply(render_car(path))
            elif path.startswith("/img/"):
                self.reply(render_car(path, SIZES[path.split("/")[2]][1]))
            elif path == "/v1/images/":
                self.reply(site.openverse(query), "application/json")
            elif path == "/w/api.php":
                self.reply(site.commons(query), "application/json")
            elif path == "/search":
                self.reply(site.google(), "text/html")
            elif path == "/captcha/search":
                self.reply("<html><p>Our systems have detected unusual traffic</p></html>", "text/html", 429)
            elif path == "/consent/search":
                self.reply(
                    "<html><h1>Before you continue to Google</h1><form action='//consent.google.com/s'></form></html>",
                    "text/html",
                )
            elif path == "/recipe/search":
                self.reply("<html>Take two eggs</html>", "text/html")
            else:
                page = site.car_pages(path)
                self.reply(page or "<html>nothing here</html>", "text/html; charset=utf-8", 200 if page else 404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def pour(self, chunk: bytes, pause: float) -> None:
        """Send without end, or until the site closes."""
        while not self.site.closing.is_set():
            self.wfile.write(chunk)
            self.wfile.flush()
            self.site.closing.wait(pause)

    def start(self, length: int | str | None, status: int = 200, **headers) -> None:
        """Send headers only; the connection ends with this answer."""
        self.send_response(status)
        for name, value in {"Content-Type": "image/jpeg", "Content-Length": length, **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True

    def misbehave(self, fault: str) -> None:
        """Do one thing wrong."""
        site, picture = self.site, render_car(fault)
        with site.lock:
            site.tried[fault] += 1
            first, second = site.tried[fault] == 1, site.tried[fault] == 2
        moves = {
            "loop.jpg": "/faults/loop.jpg",
            "private.jpg": "http://10.0.0.1/a.jpg",
            "metadata.jpg": "http://169.254.169.254/latest/",
            "loopback.jpg": f"http://127.0.0.2:{site.port}/pictures/1.jpg",
            "six.jpg": f"http://[::1]:{site.port}/pictures/1.jpg",
            "decimal.jpg": f"http://2130706434:{site.port}/pictures/1.jpg",
            "file.jpg": "file:///etc/passwd",
            "moved.jpg": "../pictures/moved.jpg",
            "closed-door.jpg": "/private/1.jpg",
            "bad-location.jpg": "http://[::1/",
            "bad-port.jpg": "http://127.0.0.1:123456/",
            "latin-location.jpg": "/pictures/\xff.jpg",
            "long-location.jpg": f"/pictures/{'a' * 9_000}.jpg",
            "other-port.jpg": site.elsewhere,
        }
        if fault in moves:
            self.reply("", status=302, Location=moves[fault])
        elif fault == "bomb-on-the-way.jpg":
            self.reply(gzip_bomb(60_000_000), status=302, Location="/pictures/moved.jpg", Content_Encoding="gzip")
        elif fault == "endless-on-the-way.jpg":
            self.start(None, status=302, Location="/pictures/moved.jpg")
            self.pour(bytes(1 << 16), 0)
        elif fault == "gone-with-a-bomb.jpg":
            self.reply(gzip_bomb(60_000_000), status=404, Content_Encoding="gzip")
        elif fault.startswith("charset="):
            self.reply("<a class=add-zip href=/x>Škoda</a>", f"text/html; {fault}")
        elif fault == "superscript.jpg":
            self.start("²³")
            self.wfile.write(picture)
        elif fault == "long-number.jpg":
            self.start("9" * 5_000)
        elif fault == "two-lengths.jpg":
            self.start("5, 6")
        elif fault == "long-header.jpg":
            self.start(len(picture), X_Long="x" * 70_000)
        elif fault == "many-headers.jpg":
            self.start(len(picture), **{f"X_{i}": "x" for i in range(200)})
        elif fault == "garbage.jpg":
            self.wfile.write(random.Random(0).randbytes(5_000))
            self.close_connection = True
        elif fault == "bad-chunk.jpg":
            self.start(None, Transfer_Encoding="chunked")
            self.wfile.write("²\r\nxx\r\n".encode())
        elif fault == "many-encodings.jpg":
            self.start(None, Content_Encoding=", ".join(["gzip"] * 50))
            self.wfile.write(gzip_bomb(60_000_000))
        elif fault == "never-unpacks.jpg":
            self.start(None, Content_Encoding="gzip")
            self.wfile.write(gzip.compress(b"")[:10])
            self.pour(b"\0\0\0\xff\xff" * 10_000, 0)
        elif fault == "busy.jpg" and first:
            self.reply("", status=429, Retry_After="1")
        elif fault == "away.jpg":
            self.reply("", status=429, Retry_After="86400")
        elif fault == "always-500.jpg" or fault == "twice-500.jpg" and (first or second):
            self.reply("<html>error</html>", "text/html", 500)
        elif fault == "silent.jpg":
            site.closing.wait(30)
            self.close_connection = True
        elif fault == "late-once.jpg" and first:
            site.closing.wait(1)
            self.reply(picture)
        elif fault == "stall.jpg":
            self.start(len(picture))
            self.wfile.write(picture[:100])
            self.wfile.flush()
            site.closing.wait(30)
        elif fault == "drip.jpg":
            self.start(len(picture))
            self.pour(b"\xff", 0.05)
        elif fault == "header-drip.jpg":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self.close_connection = True
            self.pour(b"x", 0.05)
        elif fault == "cut.jpg" or fault == "cut-once.jpg" and first:
            self.start(len(picture))
            self.wfile.write(picture[: len(picture) // 2])
        elif fault == "cut-silently.jpg":
            self.start(None)
            self.wfile.write(picture[: len(picture) // 2])
        elif fault == "endless.jpg":
            self.start(None)
            self.pour(bytes(1 << 16), 0)
        elif fault == "huge.jpg":
            self.start(10**12)
        elif fault == "gzip-bomb.jpg":
            self.reply(gzip_bomb(60_000_000), Content_Encoding="gzip")
        elif fault == "wrong-type.jpg":
            self.reply(picture, "text/html")
        elif fault == "page.jpg":
            self.reply("<!DOCTYPE html><html>Please log in</html>")
        elif fault == "empty.jpg":
            self.reply(b"")
        elif fault == "bomb.png":
            self.reply(flat_png(20_000, 20_000))
        elif fault == "dot.png":
            self.reply(flat_png(1, 1))
        elif fault == "forbidden.jpg":
            self.reply("", status=403)
        elif fault == "gone.jpg":
            self.reply("<html>not found</html>", "text/html", 404)
        else:
            self.reply(picture)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    with LocalSite(parser.parse_args().port) as site:
        print(site.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
