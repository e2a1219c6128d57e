"""Measure the exported pair and its live page: pixels and times against PyTorch, sizes, latency, body edits.

    python studies/live_page.py toy64 photo64            # writes data/records/live_page.json
    python studies/live_page.py runs/photo64             # a folder, under its name

Needs the extra `export`, Chromium and playwright, and npm or --runtime. Times mean something on a quiet machine only;
the record keeps its load.
"""
import argparse
import functools
import http.server
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from _record import save_record
from playwright.sync_api import sync_playwright

from carproto.app.body import find_body
from carproto.app.live_page import add_runtime, average_path, export_pair, find_runtime, write_live_page
from carproto.app.pipeline import CarPipeline
from carproto.blend.onnx_graph import compare_with_pytorch
from carproto.blend.speed import perceptual_embedding
from carproto.core import sample_latents
from carproto.latent.edit import LatentEditor
from carproto.latent.fit_editor import evaluate_edits

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MOVE = """position => {
    const slider = document.querySelector('#intensity');
    slider.value = position;
    slider.dispatchEvent(new Event('input'));
}"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A static server that says nothing."""

    def log_message(self, *_):
        pass


def time_page(folder: Path, n: int) -> dict:
    """Open the page in Chromium, move its slider, and return times in milliseconds."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("body[data-state=rest]")
        first = page.evaluate("window.carproto.first")
        page.evaluate("window.carproto.latencies.length = 0")
        for i in range(n):
            page.evaluate(MOVE, i / n)
            page.wait_for_selector("body[data-state=rest]")
        times = page.evaluate("window.carproto.latencies")
        backend = page.evaluate("window.carproto.backend")
        browser.close()
        server.shutdown()
    slider = {"slider_ms": round(statistics.median(times), 1), "slowest_ms": round(max(times), 1)}
    return {"backend": backend, "first_image_ms": round(first), **slider}


@torch.no_grad()
def same_car(pipeline: CarPipeline, editor: LatentEditor, n: int) -> dict[str, float]:
    """Return the share of edits by one standard deviation that stay closer to the car than close pairs of cars are.

    Two cars of one view are closer than two random ones: the limit is the tenth percentile of all pairs.
    """
    G = pipeline.common
    z = sample_latents(n, G.z_dim, seed=42)
    points = perceptual_embedding(G(z), pipeline.perceptual)
    limit = torch.pdist(points).square().quantile(0.1)
    shares = {}
    for name in editor.editable:
        moved = editor.edit(z, {name: editor.spread[editor.names.index(name)].item()})
        distance = (perceptual_embedding(G(*moved), pipeline.perceptual) - points).square().sum(1)
        shares[name] = (distance < limit).float().mean().item()
    return shares


def measure_edits(pipeline: CarPipeline, editor: LatentEditor, n: int) -> dict:
    """Evaluate edits with and without measuring."""
    held = [name for name in editor.names if name not in editor.editable]
    rows = {"held": {name: editor.error[editor.names.index(name)].item() for name in held}}
    for correct in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # edits that end at the limit of the cars that were seen
            rows["measured" if correct else "predicted"] = evaluate_edits(editor, n=n, correct=correct)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {**rows, "same_car": same_car(pipeline, editor, min(100, n))}


def measure_pipeline(name: str, arguments: argparse.Namespace) -> dict:
    """Export a pipeline and measure it."""
    pipeline = CarPipeline.from_pretrained(name)
    editor = find_body(pipeline, name)
    folder = Path(tempfile.mkdtemp()) / "page"
    graph = export_pair(pipeline, folder, Path(name).name, path=average_path(pipeline), editor=editor)
    write_live_page(folder)
    page_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    add_runtime(folder, find_runtime(arguments.runtime))
    results = {"size": pipeline.common.size, "page_mb": round(page_mb, 2)}
    results["onnx"] = compare_with_pytorch(graph, *pipeline.generators, n=arguments.n)
    results["chromium"] = time_page(folder, 30)
    if editor is not None:
        results["edits"] = measure_edits(pipeline, editor, arguments.n)
    results["load"] = os.getloadavg()[0]
    return results


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipelines", nargs="+", help="releases or folders with common/ and futuristic/")
    parser.add_argument("--n", type=int, default=200, help="blends and edited cars")
    parser.add_argument("--runtime", type=Path, help="onnxruntime-web: archive or folder; None asks npm")
    parser.add_argument("--out", type=Path, default=Path("data/records/live_page.json"))
    arguments = parser.parse_args()
    record = {}
    for name in arguments.pipelines:
        start = time.monotonic()
        record[Path(name).name] = measure_pipeline(name, arguments)
        print(f"{name}, {time.monotonic() - start:.0f} s: {record[Path(name).name]}", flush=True)
        save_record(record, arguments.out)


if __name__ == "__main__":
    main()
