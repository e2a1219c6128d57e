"""Measure the crawler: images a second without a rate limit, memory, and the pace at one request a second.

python studies/crawl_speed.py          # writes data/records/crawl.json
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from carproto.files import save_json
from carproto.run import describe_environment
from carproto.scrape.crawl import crawl
from carproto.scrape.fetch import Fetcher
from carproto.scrape.manifest import PhotoRecord, read_manifest

ROOT = Path(__file__).resolve().parents[1]
EVERY = 500  # pictures between two samples


def memory_mb() -> float:
    """Return the memory that this process holds now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure(url: str, n: int, delay: float) -> dict:
    """Crawl `n` small pictures with `delay` seconds between requests, and report pace and memory."""
    rows, start = [], time.perf_counter()

    def records():
        last = start
        for i in range(n):
            if i % EVERY == 0 and i:
                now = time.perf_counter()
                rows.append({"pictures": i, "rate": EVERY / (now - last), "memory_mb": memory_mb()})
                last = now
            yield PhotoRecord(f"{url}/pictures/{i}.jpg")

    with tempfile.TemporaryDirectory() as folder:
        summary = crawl(records(), Path(folder) / "pictures", Fetcher(delay=delay, allow_private=["127.0.0.1"]))
        seconds = time.perf_counter() - start
        sizes = [row["bytes"] for row in read_manifest(Path(folder) / "pictures")]
    if summary.saved != n or summary.failed:
        sys.exit(f"the crawl did not end well: {summary}")
    return {
        "n": n,
        "delay": delay,
        "seconds": seconds,
        "pictures_per_second": n / seconds,
        "mean_bytes": round(sum(sizes) / n),
        "rows": rows,
    }


def main() -> None:
    """Serve the local site from a process of its own, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=6_000, help="pictures without a limit")
    parser.add_argument("--n_polite", type=int, default=20, help="pictures at one request a second")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "records" / "crawl.json")
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "local_site.py"], stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        fast = measure(url, args.n, delay=0)
        fast["memory_grown_mb"] = fast["rows"][-1]["memory_mb"] - fast["rows"][1]["memory_mb"]
        polite = measure(url, args.n_polite, delay=1)
    finally:
        server.terminate()
        server.wait()
    save_json({"unlimited": fast, "polite": polite, "n_workers": 8, "environment": describe_environment()}, args.out)
    print(
        f"{fast['pictures_per_second']:.0f} pictures a second, "
        f"{fast['memory_grown_mb']:.1f} MB more at the end; {args.out}"
    )


if __name__ == "__main__":
    main()
