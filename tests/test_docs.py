"""The documentation as nbdev makes it, before Quarto: every page, every link, every public name."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("carproto", "data", "nbs", "settings.ini", "setup.py", "pyproject.toml", "README.md")
SCRATCH = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked")
SITE, REPOSITORY = "https://carproto.github.io/carproto", "https://github.com/carproto/carproto"
COLAB = "https://colab.research.google.com/github/carproto/carproto/blob/main/"
PROCESS = """
import json, sys
from nbdev.doclinks import _build_modidx
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

if __name__ == "__main__":
    refresh_quarto_yml()
    _build_modidx()
    nbdev_sidebar.__wrapped__()
    proc_nbs("nbs", n_workers=int(sys.argv[1]), force=True)
"""


@dataclass
class Page:
    """A processed notebook: what a reader sees of it."""

    prose: str  # Markdown that is not code, of cells and outputs
    all_text: str  # everything, code and printed output included
    text: str  # Markdown of cells alone, as it was written
    output: str  # name of the page, such as train.html

    @property
    def anchors(self) -> set[str]:
        """What a link can point at, as Pandoc names headings."""
        headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", self.prose, re.MULTILINE)
        return {to_anchor(heading) for heading in headings} | set(re.findall(r"\{#([\w.-]+)", self.prose))

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r'(?:\]\(|(?:src|href)=")<?([^)"\s>]+)', self.prose)


def to_anchor(heading: str) -> str:
    """Make the identifier that Pandoc gives a heading."""
    text = re.sub(r"\{[^}]*\}\s*$|[`*]|\[(.*?)\]\(.*?\)", lambda match: match[1] or "", heading).strip().lower()
    text = re.sub(r"(?<![^\W_])__?(\S+?)__?(?![^\W_])", r"\1", text)  # emphasis
    return re.sub(r"^[^a-z]+", "", re.sub(r"[^\w.\s-]", "", re.sub(r"\s+", "-", text)))


def read_page(path: Path) -> Page:
    """Read what nbdev made of a notebook."""
    prose, everything, text, output = [], [], [], ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell.get("source") or "")
        everything.append(source)
        if cell["cell_type"] == "raw" and "output-file" in source:
            output = yaml.safe_load(source.strip().strip("-"))["output-file"]
        if cell["cell_type"] == "markdown":
            prose.append(source)
            text.append(source)
        for results in cell.get("outputs", []):
            data = results.get("data", {})
            everything += [
                "".join(value)
                for kind, value in [*data.items(), ("text", results.get("text", ""))]
                if not kind.startswith("image/")
            ]
            prose += ["".join(data[kind]) for kind in ("text/markdown", "text/html") if kind in data]
    return Page(drop_code("\n\n".join(prose)), "\n".join(everything), drop_fences("\n\n".join(text)), output)


def drop_fences(markdown: str) -> str:
    """Leave out blocks of code."""
    return re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)


def drop_code(markdown: str) -> str:
    """Leave out code, whose brackets are no links; the ticks in headings and around names that are links go alone."""
    text = re.sub(
        r"^#+ .*$|\[`[^`\n]+`\](?=\()",
        lambda match: match[0].replace("`", ""),
        drop_fences(markdown),
        flags=re.MULTILINE,
    )
    return re.sub(r"`[^`\n]+`", "", text)


def find_dead_links(pages: dict[str, Page], folder: Path, repository: Path) -> list[str]:
    """List links of pages, named by their path below `folder`, that lead to no page, place, picture or file of ours."""
    by_output = {(PurePosixPath(name).parent / page.output).as_posix(): page for name, page in pages.items()}
    dead = []
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if target.startswith(SITE):
                results = by_output.get(target.removeprefix(SITE).strip("/") or "index.html")
                has_entry = not any(part.startswith("_") for part in anchor.split("."))  # only public names have one
                anchors = (
                    set() if results is None else results.anchors | {to_anchor(heading) for heading in results.anchors}
                )
                if results is None or (anchor and has_entry and anchor not in anchors):
                    dead.append(f"{name}: {link}")
            elif target.startswith((REPOSITORY, COLAB)):
                inside = re.match(r".*?/(?:blob|tree)/main/(.+)", target)
                if inside and not (repository / inside[1]).exists():
                    dead.append(f"{name}: {link}")
            elif not re.match(r"[a-z]+:", link):
                path = (PurePosixPath(name).parent / target) if target else PurePosixPath(name)
                page_there = pages.get(os.path.normpath(path))
                if not (folder / path).exists() or (anchor and page_there and anchor not in page_there.anchors):
                    dead.append(f"{name}: {link}")
    return dead


def public_names(module: Path) -> tuple[list[str], list[str]]:
    """Read what a module offers: functions and classes, which get entries, and constants that need prose."""
    source = module.read_text(encoding="utf-8")
    tree = ast.parse(source)
    defined = {
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
    }
    offered = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    commented = set(re.findall(r"^(\w+)(?:, \w+)*(?:: [^=]+)? = .*#", source, re.MULTILINE))
    commented |= {
        name for names in re.findall(r"^(\w+(?:, \w+)+) = .*#", source, re.MULTILINE) for name in names.split(", ")
    }
    return [name for name in offered if name in defined], [name for name in offered if name not in defined | commented]


def find_untold(modules: list[Path], pages: dict[str, Page]) -> list[str]:
    """List public names, as module.name, that have no entry on their page and stand nowhere in its prose."""
    by_output, untold = {}, []
    for name, page in pages.items():
        by_output[re.sub(r"^\d+_", "", PurePosixPath(name).parent.name), page.output] = page
    for module in modules:
        room = "base" if module.parent.name == "carproto" else module.parent.name
        output = f"{module.stem}.html"
        page = by_output[room if (room, output) in by_output else "", output]
        entries, others = public_names(module)
        missing = [name for name in entries if to_anchor(name) not in page.anchors]
        missing += [name for name in others if f"`{name}`" not in page.text]
        untold += [f"{module.stem}.{name}" for name in missing]
    return untold


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> tuple[Path, str]:
    """Process all notebooks of a copy of the tree; give the folder of the pages, and what was said on the way."""
    tree = tmp_path_factory.mktemp("docs") / "tree"
    for part in PARTS:
        source, target = ROOT / part, tree / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=SCRATCH) if source.is_dir() else shutil.copy(source, target)
    (tree / "process.py").write_text(PROCESS)
    environment = {
        **os.environ,
        "XDG_CONFIG_HOME": str(tree.parent / "no-config"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tree),
    }
    workers, start = str(min(2, os.cpu_count() or 1)), time.monotonic()
    line = [sys.executable, "process.py", workers]
    done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    print(f"{time.monotonic() - start:.0f} s for all pages with {workers} processes")
    assert done.returncode == 0, done.stdout + done.stderr
    return tree, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pages(docs) -> dict[str, Page]:
    """All pages that were made, by the path of their notebook below nbs."""
    folder = docs[0] / "_proc"
    return {path.relative_to(folder).as_posix(): read_page(path) for path in folder.rglob("*.ipynb")}


def test_every_notebook_becomes_a_page(docs, pages):
    """A cell that fails, whatever its flags, ends the making of its page."""
    tree, text = docs
    lost = {path.relative_to(tree / "nbs").as_posix() for path in (tree / "nbs").rglob("*.ipynb")} - set(pages)
    assert not lost, f"no page was made of {sorted(lost)}: {text[-3000:]}"
    assert "Error in notebook" not in text and "Traceback" not in text, text[-3000:]
    mixed = re.findall(r"Found cells containing imports and other code.*?\n---\n(.*?)\n---\n", text, re.DOTALL)
    assert not mixed, f"imports need a cell of their own, since nbdev runs all that stands with them: {mixed}"


def test_pages_show_prose_and_reference_but_no_exported_code(docs, pages):
    core = next(page for name, page in pages.items() if name.startswith("0_base/") and name.endswith("_core.ipynb"))
    assert core.output == "core.html" and "seeded" in core.all_text and "#| export" not in core.all_text
    stored = [
        path
        for path in (docs[0] / "_proc").rglob("*.ipynb")
        if re.search(r'"output_type":\s*"error"', path.read_text(encoding="utf-8"))
    ]
    assert not stored, f"show an error: {[path.name for path in stored]}"


def test_links_pictures_and_anchors_lead_somewhere(docs, pages):
    assert sum(len(page.links) for page in pages.values()) > 500, "the links of the reference are not seen"
    assert not (dead := find_dead_links(pages, docs[0] / "_proc", ROOT)), "\n".join(dead)


def test_every_public_name_is_on_its_page(docs, pages):
    modules = sorted((docs[0] / "carproto").rglob("[a-z]*.py"))
    assert len(modules) > 30 and not (untold := find_untold(modules, pages)), (
        f"have no entry, or no word in the prose: {untold}"
    )


def test_sidebar_and_settings_name_what_is_there(docs, pages):
    nbs = docs[0] / "nbs"
    contents = yaml.safe_load((nbs / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [name for entry in contents for name in (entry["contents"] if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(pages), "the sidebar names other pages than there are"
    assert len(listed) == len(set(listed)) and listed[0] == "index.ipynb"
    settings = yaml.safe_load((nbs / "_quarto.yml").read_text(encoding="utf-8"))
    site, form = settings["website"], settings["format"]["html"]
    assert set(form["theme"]) == {"light", "dark"}
    for name in (site["favicon"], site["navbar"]["logo"], site["image"], form["css"], *settings["metadata-files"]):
        assert (docs[0] / "_proc" / name).exists(), f"_quarto.yml names {name}, which is not there"


def test_planted_mistakes_are_seen(tmp_path):
    """A missing page, place, picture and file, one of each kind of link; and what is right is left alone."""
    good = "# A\n\n## What is *new*\n\n### `Thing.__call__`\n\n"
    good += "[a](a.ipynb#what-is-new) [b](#thing.call) `[not](a-link)` [x](https://x.org/y#z)"
    good += f" [s]({SITE}/a.html#what-is-new) [f]({REPOSITORY}/blob/main/file.py#L3) ![p](p.jpg)"
    bad = ["none.ipynb", "a.ipynb#old", "#old", "q.jpg", f"{SITE}/b.html", f"{SITE}/a.html#old"]
    bad += [f"{REPOSITORY}/blob/main/none.py", f"{COLAB}none.ipynb"]
    for name in ("a.ipynb", "p.jpg", "file.py"):
        (tmp_path / name).touch()
    assert find_dead_links({"a.ipynb": Page(drop_code(good), "", "", "a.html")}, tmp_path, tmp_path) == []
    page = Page(drop_code(good + "".join(f" [bad]({link})" for link in bad)), "", "", "a.html")
    assert find_dead_links({"a.ipynb": page}, tmp_path, tmp_path) == [f"a.ipynb: {link}" for link in bad]


def test_planted_gaps_in_the_reference_are_seen(tmp_path):
    """A name told in code alone, in output alone, or not at all; and one that prose tells is left alone."""
    module, fenced = tmp_path / "car.py", "\n\n```python\nSEATS = `DOORS`\n```"
    cells = [
        {"cell_type": "raw", "source": "---\noutput-file: car.html\n---"},
        {
            "cell_type": "markdown",
            "source": "`WHEELS` is 4, and [`borrowed`](other.html#borrowed) comes from elsewhere." + fenced,
        },
        {
            "cell_type": "code",
            "source": "SEATS",
            "outputs": [{"data": {"text/markdown": "### drive\n\none of `SEATS`"}}],
        },
    ]
    module.write_text(
        "__all__ = ['WHEELS', 'SEATS', 'DOORS', 'borrowed', 'drive', 'park']\ndef drive(): 0\ndef park(): 0\n"
    )
    (tmp_path / "car.ipynb").write_text(json.dumps({"cells": cells}))
    assert find_untold([module], {"car.ipynb": read_page(tmp_path / "car.ipynb")}) == [
        "car.park",
        "car.SEATS",
        "car.DOORS",
    ]
