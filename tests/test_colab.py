"""The tutorials on a machine like Colab's: no carproto yet, ipywidgets 7, no Drive, no GPU.

The cells run in a kernel of their own, the setup cells among them, with a copy of this tree in place of GitHub and a
temporary folder in place of /content. ipywidgets 7.7 is fetched once and kept in the temporary folder of this
machine. Where it cannot be fetched the tests are skipped, except where CI is set: there they fail."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from local_site import LocalSite  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("carproto", "data", "nbs", "settings.ini", "setup.py", "pyproject.toml", "README.md")
WIDGETS = ("ipywidgets==7.7.5", "ipython-genutils==0.2.0")
SKIPPED = re.compile(r"^#\|\s*eval:\s*false", re.MULTILINE)
DRIVER = """
import sys, nbformat
from nbclient import NotebookClient
path, folder = sys.argv[1:]
book = nbformat.read(path, as_version=4)
NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
nbformat.write(book, path)
"""
AS_IN_COLAB = """
import sys, types

def refuse(place):
    raise ValueError("mount failed")

sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google.colab"].drive = types.SimpleNamespace(mount=refuse)
"""
IS_COLAB = """
import ipywidgets, torch, carproto
assert ipywidgets.__version__.startswith("7."), ipywidgets.__version__
assert carproto.__file__.startswith({content!r}), carproto.__file__
assert not torch.cuda.is_available()
"""
LOCAL_WEB = """
from_the_web, before = scrape, dict(given)

def scrape(options):
    image_url = {url!r} + "/img/" if options.source == "car-connection" else None
    from_the_web(replace(options, base_url={url!r}, image_url=image_url, delay=0.0, limit=4))
"""
SCRAPED = """
assert all(len(list(Path(given[name]).rglob("*.jpg"))) == 4 for name in ("cars", "concepts")), given
given = before
"""
STUDIO = """
import io
from carproto.images import to_picture
from carproto.toycars.dataset import ToyCars

def moves(change):
    before = studio.picture.value
    change()
    assert studio.picture.value != before and studio.picture.value.startswith(b"\\x89PNG"), studio.message.value

studio.intensity.value = 0.0
moves(lambda: setattr(studio.intensity, "value", 1.0))
moves(lambda: setattr(studio.car_b, "value", 2))
moves(lambda: setattr(studio.intensity, "value", 0.5))
studio.follow.value = False
moves(lambda: setattr(studio.generator, "value", 0.0 if studio.generator.value else 1.0))
studio.random.click()
for name, button in studio.save.items():
    button.click()
    assert "role=\\"alert\\"" not in studio.message.value, studio.message.value


def choose_file(control, name, content):
    "Do what ipywidgets 7 does when a file was chosen."
    control.metadata, control.data = [{"name": name, "type": "", "size": len(content), "lastModified": 0}], [content]
    control._counter += 1


assert isinstance(studio.upload.value, dict), "this is not the FileUpload of ipywidgets 7"
choose_file(studio.upload, "car.json", b"%PDF")
assert "is not JSON" in studio.message.value, studio.message.value
recipe = studio.write("again.json")
studio.intensity.value = 0.0
choose_file(studio.upload, "again.json", recipe.read_bytes())
assert "is loaded" in studio.message.value, studio.message.value
picture = io.BytesIO()
to_picture(ToyCars(1, 64, seed=9).images[0]).save(picture, "png")
n_cars = len(studio.cars)
choose_file(studio.photo, "mine.png", picture.getvalue())
"""
LABELLING = """
import tempfile
from pathlib import Path
from carproto.app.labelling import LabelPanel
from carproto.data.labels import read_labels
from carproto.data.views import render_views

folder = Path(tempfile.mkdtemp())
for i, image in enumerate(render_views(9, 32, seed=3)[0]):
    to_picture(image).save(folder / f"{i}.png")
panel = LabelPanel(folder)
panel
"""
LABELS = """
shown = panel.name
panel.buttons["rear"].click()
assert read_labels(folder) == {shown: "rear"} and panel.name != shown
panel.key.value = "74"
assert sorted(read_labels(folder).values()) == ["left", "rear", "rear-left"] and panel.key.value == "74"
panel.undo.click()
panel.key.value = "0"
assert read_labels(folder) == {shown: "rear"} and "role" not in panel.message.value, panel.message.value
"""


@pytest.fixture(scope="session")
def widgets() -> Path:
    """ipywidgets as Colab has it, in a folder of its own."""
    folder = Path(tempfile.gettempdir()) / "carproto-{}".format(WIDGETS[0].replace("==", "-"))
    if not (folder / "ipywidgets").exists():
        fresh = Path(tempfile.mkdtemp())
        line = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--retries",
            "1",
            "--target",
            fresh,
            *WIDGETS,
        ]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        if done.returncode:
            missing = f"{WIDGETS[0]} cannot be fetched: {done.stderr[-500:]}"
            pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(fresh, folder)
    return folder


@pytest.fixture
def machine(widgets, tmp_path) -> Path:
    """A Python with the packages of this one, but ipywidgets 7 and no carproto; and a copy of this tree to clone."""
    venv.create(tmp_path / "python", with_pip=False, symlinks=True)
    for part in PARTS:
        target = tmp_path / "upstream" / part
        target.parent.mkdir(exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "records")
        shutil.copytree(ROOT / part, target, ignore=ignore) if (ROOT / part).is_dir() else shutil.copy(
            ROOT / part, target
        )
    (own_part,) = (tmp_path / "python").glob("lib/python*/site-packages")
    # a path in a .pth file counts after its folder; .pth files of that path, such as carproto's own, are not read
    (own_part / "shared.pth").write_text(f"{widgets}\n{sysconfig.get_paths()['purelib']}\n")
    (tmp_path / "content").mkdir()
    return tmp_path


def find_code(tutorial: str, machine: Path, word: str = "") -> list[str]:
    """Read the code cells of a tutorial, or those with a word in them; its places are moved to the machine."""
    book = nbformat.read(ROOT / "nbs" / "tutorials" / tutorial, as_version=4)
    return [
        cell.source.replace("/content", f"{machine}/content")
        for cell in book.cells
        if cell.cell_type == "code" and word in cell.source
    ]


def cells_of(tutorial: str, machine: Path) -> list[str]:
    """Take the cells that a reader runs: the setup cell first, and then what is not `eval: false`."""
    (setup,) = find_code(tutorial, machine, "git clone")
    (clone,) = re.findall(r"!git clone .*", setup)
    setup = setup.replace(clone, f"!cp -r {machine}/upstream carproto").replace(
        "%pip install -q", "%pip install -q --no-index --no-build-isolation"
    )
    return [
        setup,
        *(cell for cell in find_code(tutorial, machine) if not SKIPPED.search(cell) and "import nbdev" not in cell),
    ]


def run_cells(cells: list[str], machine: Path) -> str:
    """Run cells in a kernel of the machine; return what they printed."""
    path = machine / "cells.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in cells]), path
    )
    points = {"HOME": str(machine), "CARPROTO_CACHE": str(machine / "cache"), "JUPYTER_PATH": "", "MPLBACKEND": "agg"}
    environment = {**os.environ, **points, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    start = time.monotonic()
    line = [machine / "python" / "bin" / "python", "-c", DRIVER, path, machine]
    done = subprocess.run(line, env=environment, cwd=machine, capture_output=True, text=True, timeout=900)
    print(f"{time.monotonic() - start:.0f} s")
    assert done.returncode == 0, done.stderr[-4000:]
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_quickstart_and_panels(machine):
    cells = cells_of("01_quickstart.ipynb", machine)
    checks = [IS_COLAB.format(content=str(machine / "content")), STUDIO, LABELLING, LABELS]
    run_cells([AS_IN_COLAB, *cells, *checks], machine)


def test_your_cars(machine):
    """All stages in a folder of its own, with photos from a local web; then again from the top on an empty disk."""
    setup, *cells = cells_of("02_your_cars.ipynb", machine)
    position = next(i for i, cell in enumerate(cells) if "def sort_photos" in cell)
    with LocalSite() as site:
        scraping = [
            LOCAL_WEB.format(url=site.url),
            find_code("02_your_cars.ipynb", machine, "scrape(Scrape(")[0],
            SCRAPED,
        ]
        again = ["shutil.rmtree(disk)", *cells, IS_COLAB.format(content=str(machine / "content"))]
        text = run_cells([AS_IN_COLAB, setup, *cells[:position], *scraping, *cells[position:], *again], machine)
    assert text.count("going on without Drive (mount failed)") == 2
    home = machine / "content" / "my_cars"
    assert (home / "pair.zip").exists() and (home / "blend" / "recipe.json").exists()
    sessions = [len((home / run / "sessions.jsonl").read_text().splitlines()) for run in ("common", "tuned", "future")]
    assert sessions == [4, 2, 2], "the second time, runs must go on"
