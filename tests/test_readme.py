"""README says what is true: its links lead somewhere, its commands exist, its code names what the library has."""

import re
import runpy
from pathlib import Path
from shlex import split

import nbformat
import pytest

from carproto.app.cli import parse

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
make_readme = runpy.run_path(str(ROOT / "tools/readme.py"))["make_readme"]


def find_code(language: str) -> list[str]:
    """Collect README's fenced code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_links_into_the_repository_lead_to_files():
    relative = re.findall(r'(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"\s]+)', TEXT)
    on_github = re.findall(r"/carproto/carproto/(?:blob|tree)/main/([^)\s]+)", TEXT)
    missing = {link for link in relative + on_github if not (ROOT / link.split("#")[0]).exists()}
    assert relative and on_github and not missing, f"lead nowhere: {sorted(missing)}"


def test_rooms_name_their_notebooks():
    """Every room and tutorial is there, and a main name is defined in the notebook that it links to."""
    rooms = {path.name for path in (ROOT / "nbs").glob("[0-9]_*") if path.is_dir()}
    rows = {room: row for room, row in re.findall(r"^\| \[`(\w+)`\]\((.*)$", TEXT, re.MULTILINE)}
    assert len(rooms) == 9 and set(rows) == rooms, f"not in the table of rooms: {sorted(rooms ^ set(rows))}"
    strangers = [
        f"{name} in {path}"
        for names, path in re.findall(r"\[([^]]*)\]\((nbs/[^)]+\.ipynb)\)", TEXT)
        for name in re.findall(r"`(\w+)`", names)
        if not re.search(rf"\b(?:def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"))
    ]
    for room, row in rows.items():
        assert all(path.startswith(f"nbs/{room}/") for path in re.findall(r"\((nbs/.+?)\)", row)), room
    assert not strangers, f"not defined there: {strangers}"
    for folder in ("tutorials", "results"):
        missing = [
            path.name
            for path in (ROOT / "nbs" / folder).glob("[0-9]*.ipynb")
            if f"](nbs/{folder}/{path.name})" not in TEXT
        ]
        assert not missing, f"not in README: {missing}"


def test_extras_are_those_of_the_settings():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+)_requirements", settings, re.MULTILINE))
    table = TEXT[TEXT.index("| extra |") : TEXT.index("## Data and ethics")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == extras


def test_commands_exist():
    shell = "\n".join(find_code("bash"))
    targets = set(re.findall(r"\bmake (\w+)", shell))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= targets <= rules
    lines = re.findall(r"^carproto .+$", shell, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        assert parse(split(line)[1:])
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE), (
        "CI runs another test command"
    )


def test_code_runs(tmp_path, monkeypatch):
    """The five lines run as they stand; the call that trains for long is only checked against the signature."""
    monkeypatch.chdir(tmp_path)
    first, *others = find_code("python")
    namespace = {}
    exec(first, namespace)
    assert len(first.strip().splitlines()) <= 7 and len(namespace["frames"]) == 5
    for code in others:
        exec("\n".join(re.findall(r"^(?:from carproto\S* )?import .+$", code, re.MULTILINE)), {})
        compile(code, "README.md", "exec")


@pytest.fixture
def notebook_path(tmp_path) -> Path:
    """Write a notebook that has one cell of each kind."""
    new, output = nbformat.v4, nbformat.v4.new_output
    table = output("execute_result", data={"text/markdown": "[table](13_toycars.ipynb)"})
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    cells = [
        new.new_markdown_cell(
            '# title\n\n[core](00_core.ipynb) [up](../LICENSE) [out](https://x.org) [in](#a) <img src="images/a.jpg">'
        ),
        new.new_code_cell("#| hide\nsecret = 1"),
        new.new_code_cell("#| export\ndef exported(): pass"),
        new.new_code_cell("#| eval: false\nshown = 2"),
        new.new_code_cell("#| echo: false\ntable()", outputs=[table]),
        new.new_code_cell("print('words')", outputs=[output("stream", text="words\n")]),
        new.new_code_cell("picture", outputs=[output("display_data", data={"image/png": pixel})]),
    ]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "index.ipynb")
    return tmp_path / "index.ipynb"


def test_generator_obeys_directives_and_moves_links(notebook_path):
    text, pictures = make_readme(notebook_path)
    for selected in (
        "# title",
        "](nbs/00_core.ipynb)",
        "](LICENSE)",
        "](https://x.org)",
        "](#a)",
        'src="nbs/images/a.jpg"',
    ):
        assert selected in text
    assert "```python\nshown = 2\n```" in text and "[table](nbs/13_toycars.ipynb)" in text and "    words" in text
    for dropped in ("secret", "exported", "table()", "#|"):
        assert dropped not in text
    ((name, content),) = pictures.items()
    assert name.startswith("nbs/images/readme_") and f"]({name})" in text and content.startswith(b"\x89PNG")
