"""The form of the notebooks: title, outputs, imports, order. `nbdev_test` runs them."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
ROOMS = [path for path in PATHS if path.parent.name[0].isdigit()]  # the notebooks that write modules
COLAB = "https://colab.research.google.com"
SETUP = """#| eval: false
import sys

if "google.colab" in sys.modules:
    %cd /content
    !git clone --depth 1 https://github.com/carproto/carproto
    %cd carproto/nbs/tutorials
    %pip install -q -e ../..{extras}
    sys.path.insert(0, "/content/carproto")  # a running kernel does not see what was just installed in this way"""
MACHINE_PATH = re.compile(r"/(?:home|root|Users|work)/\w|/tmp/tmp\w")


def name_of(path: Path) -> str:
    """Name a notebook from nbs/ on."""
    return path.relative_to(ROOT / "nbs").as_posix()


@pytest.fixture(params=PATHS, ids=name_of)
def path(request) -> Path:
    """Give each notebook in turn."""
    return request.param


def find_module(notebook) -> str | None:
    """Find the module that a notebook writes."""
    match = re.search(r"^#\| default_exp (\S+)", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    return match and match[1]


def test_notebook_is_stored_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    errors = [output.ename for output in outputs if output.output_type == "error"]
    assert not errors, f"stored with errors: {errors}"
    assert outputs, "no output is stored: run `make notebooks`"
    assert not MACHINE_PATH.search(str(outputs)), "an output shows a path of the machine that it ran on"
    assert path.stat().st_size <= 500_000, f"{path.stat().st_size:,} bytes: store smaller figures"


def test_notebook_has_the_house_shape(path):
    notebook = nbformat.read(path, as_version=4)
    assert re.match(r"# .+\n\n> .+", notebook.cells[0].source), "the first cell is `# title` and `> purpose`"
    assert "nbdev.nbdev_export()" in notebook.cells[-1].source and "#| hide" in notebook.cells[-1].source
    assert set(notebook.metadata) == {"kernelspec"}
    purpose = re.search(r"^> (.+)", notebook.cells[0].source, re.MULTILINE)[1]
    assert len(purpose.split()) <= 16, f"a purpose has at most 16 words: {purpose}"


def test_classes_have_at_most_ten_patched_methods():
    """A class with more is several things."""
    counts = {}
    for path in (ROOT / "carproto").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "patch" in map(ast.unparse, node.decorator_list):
                name = ast.unparse(node.args.args[0].annotation)
                counts[name] = counts.get(name, 0) + 1
    large = {name: n for name, n in counts.items() if n > 10}
    assert counts and not large, large


def test_only_generated_lists_of_names_have_long_lines():
    """ruff checks the cells; in the modules nbdev writes longer lines for `__all__` alone."""
    long = {}
    for path in (ROOT / "carproto").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        body = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.MULTILINE | re.DOTALL)
        if path.name != "_modidx.py" and any(len(line) > 120 for line in body.splitlines()):
            long[path.name] = [line for line in body.splitlines() if len(line) > 120]
    assert not long, long


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    """Map each module to its notebook."""
    return {find_module(nbformat.read(path, as_version=4)): name_of(path) for path in ROOMS}


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in PATHS if path.name[0].isdigit()}), ids=lambda folder: folder.name
)
def test_numbers_of_a_folder_are_unique(folder):
    numbers = [path.name.split("_")[0] for path in folder.glob("*.ipynb")]
    assert len(numbers) == len(set(numbers)), sorted(numbers)


def test_modules_are_named_by_room_and_notebook(names):
    """`8_app/35_cli.ipynb` writes `carproto.app.cli`; the modules of `0_base` stand in `carproto` itself."""
    for module, name in names.items():
        room, stem = Path(name).parent.name.split("_", 1)[1], Path(name).stem.split("_", 1)[1]
        assert module == (stem if room == "base" else f"{room}.{stem}"), name


def test_notebook_imports_only_lower_numbers(path, names):
    """The rooms are numbered, and so are the notebooks in a room."""
    notebook = nbformat.read(path, as_version=4)
    module = find_module(notebook)
    if module is None:
        pytest.skip("writes no module")
    higher = set()
    for cell in notebook.cells:
        if (
            cell.cell_type == "code"
            and "import" in cell.source
            and not re.search(r"^\s*[%!]", cell.source, re.MULTILINE)
        ):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carproto."):
                    imported = node.module.removeprefix("carproto.")
                    is_room = any(name.startswith(f"{imported}.") for name in names)
                    for name in [f"{imported}.{alias.name}" for alias in node.names] if is_room else [imported]:
                        assert name in names, f"carproto.{name} has no notebook"
                        higher |= {name} if names[name] >= names[module] else set()
    assert not higher, f"imports from later notebooks: {higher}"


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent.name == "tutorials"], ids=name_of)
def test_tutorial_opens_and_installs_in_colab(path):
    """The badge has a cell of its own, since nbdev drops it from the title's; one setup cell serves all tutorials."""
    cells = nbformat.read(path, as_version=4).cells
    link = f"{COLAB}/github/carproto/carproto/blob/main/nbs/tutorials/{path.name}"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"
    assert cells[1].source == badge and cells[1].cell_type == "markdown"
    (setup,) = (cell.source for cell in cells if "git clone" in cell.source)
    assert setup == SETUP.format(extras=(re.findall(r"\[[\w,]+\]", setup) or [""])[0])
