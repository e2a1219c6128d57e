"""Write README.md from nbs/index.ipynb, without Quarto.

Markdown cells are kept, shown code cells become fenced code with their stored outputs, and links get the path that
they have from the root of the repository.

    python tools/readme.py
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "nbs/images"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.+?)\s*\n?$", re.MULTILINE)
LEFT_OUT = {"hide", "default_exp", "export", "exporti", "include: false"}
RELATIVE_LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)')
NOTE = "<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook. -->"


def from_root(markdown: str) -> str:
    """Turn links that start at nbs/ into links that start at the root."""
    return RELATIVE_LINK.sub(lambda link: link[1] + posixpath.normpath(posixpath.join("nbs", link[2])), markdown)


def prepare(cell) -> bool:
    """Obey the cell's directives and take them out; say whether the cell is shown."""
    if cell.cell_type == "markdown":
        cell.source = from_root(cell.source)
        return True
    if cell.cell_type != "code":
        return False
    directives = set(DIRECTIVE.findall(cell.source))
    if any(directive.split()[0] in LEFT_OUT or directive in LEFT_OUT for directive in directives):
        return False
    cell.source = DIRECTIVE.sub("", cell.source).strip()
    cell.metadata["transient"] = {"remove_source": "echo: false" in directives or not cell.source}
    cell.outputs = [] if "output: false" in directives else cell.outputs
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}):
            output.data["text/markdown"] = from_root(output.data["text/markdown"])
    return True


def make_readme(notebook_path: Path) -> tuple[str, dict[str, bytes]]:
    """Return README's text and the pictures that its code cells drew, by path."""
    notebook = nbformat.read(notebook_path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if prepare(cell)]
    notebook.metadata["language_info"] = {"name": "python"}
    names = {"unique_key": "readme", "output_files_dir": IMAGES}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"{NOTE}\n\n{text}\n", resources.get("outputs", {})


def write_readme() -> None:
    """Write README.md and its pictures."""
    text, pictures = make_readme(ROOT / "nbs/index.ipynb")
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    for old in (ROOT / IMAGES).glob("readme_*"):
        old.unlink()
    for name, content in pictures.items():
        (ROOT / name).write_bytes(content)


if __name__ == "__main__":
    write_readme()
