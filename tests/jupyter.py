"""JupyterLab and pages from disk, driven by a real browser: what the browser tests share.

    from jupyter import SHOTS, browser, open_notebook, serve_lab, write_notebook

`browser` is a fixture. It needs Chromium and the Python package playwright: where they are missing the tests that use
it are skipped, except where CI is set: there they fail. Screenshots go to artifacts/screenshots."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "artifacts" / "screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage""".split()
PATIENCE = 120_000  # milliseconds that a busy machine may take for one step
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    await app.shell.currentWidget.sessionContext.ready;
    await app.commands.execute('notebook:run-all-cells');
}"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, one for all tests of a file."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if BROWSER is None or sync_playwright is None:
        missing = "Chromium (apt-get install chromium)" if BROWSER is None else "playwright (pip install playwright)"
        if os.environ.get("CI"):
            pytest.fail(f"CI must test in a browser, but {missing} is missing")
        pytest.skip(f"no browser tests here: {missing} is missing")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


def write_notebook(path: Path, *cells: str) -> Path:
    """Write a notebook of code cells."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    book.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(book, path)
    return path


@contextmanager
def serve_lab(folder: Path, home: Path) -> Iterator[str]:
    """Run JupyterLab over a folder, on a free port of this machine and with settings of its own; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"""--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port}
        --ServerApp.port_retries=0 --IdentityProvider.token= --ServerApp.password= --ServerApp.root_dir={folder}
        --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly""".split()
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    points = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **points, "PYTHONPATH": str(ROOT), "HOME": str(home)}
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=2).close()
                break
            except OSError:
                text = (home / "lab.log").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < deadline, f"JupyterLab does not answer: {text}"
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()  # on a machine that is busy, kernels may take longer to go
            server.wait()


def open_notebook(browser, url: str, ready: str):
    """Open a notebook, run it, and wait for what `ready` selects; errors of the page are in `page.complaints`."""
    page = browser.new_page(viewport={"width": 1400, "height": 1100})
    page.set_default_timeout(PATIENCE)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            page.complaints.append(f"{message.text} ({message.location})") if message.type == "error" else None
        ),
    )
    page.goto(url)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.evaluate(RUN_ALL)
    page.wait_for_selector(ready)
    return page


def show_in(page, selector: str, width: int, theme: str) -> None:
    """Show what `selector` selects at a width, in the light or the dark theme."""
    page.set_viewport_size({"width": width, "height": 1100})
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}"
    )
    page.wait_for_timeout(1200)
    page.evaluate("selector => document.querySelector(selector).scrollIntoView()", selector)
    page.wait_for_timeout(300)


def check_layout(page, panel: str, parts: str) -> None:
    """Check that no part of a panel is cut off, and that none covers another."""
    frame = page.locator(panel).bounding_box()
    boxes = [
        box
        for box in (part.bounding_box() for part in page.locator(f"{panel} :is({parts})").all())
        if box and box["width"] and box["height"]
    ]
    assert boxes, f"{panel} shows nothing"
    for i, box in enumerate(boxes):
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, f"a control is cut off: {box} in {frame}"
        for other in boxes[i + 1 :]:
            wide, high = (
                min(box[k] + box[s], other[k] + other[s]) - max(box[k], other[k])
                for k, s in (("x", "width"), ("y", "height"))
            )
            assert wide <= 1 or high <= 1, f"controls overlap: {box} and {other}"
