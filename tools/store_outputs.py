"""Run notebooks in place and store their outputs, so that a reader sees the figures without running anything.

Cells marked `eval: false`, `slow` or `cuda` keep the outputs that they have. Only cells that measure time change from
run to run.

    python tools/store_outputs.py nbs/0_base/01_core.ipynb ...      # these; none named means all
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from tqdm import tqdm

KEPT = re.compile(r"^\s*#\s*\|\s*(eval:\s*false|slow|cuda)\s*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|")
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w{8}\b")  # a folder of `tempfile.mkdtemp`


class StoringClient(NotebookClient):
    """An nbclient that leaves marked cells, and the outputs they hold, alone."""

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and KEPT.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def join_streams(notebook) -> None:
    """Join pieces of one stream, whose cuts depend on timing; drop bars, widgets and names of temporary folders."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        joined = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            is_widget = output.get("data", {}).pop(WIDGET, None) is not None
            if is_widget and BAR.search(output.data.get("text/plain", "")):
                continue
            if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if output.output_type == "stream":
                output.text = TEMPORARY.sub("folder", output.text)
        cell.outputs = joined


def main() -> None:
    """Run each named notebook and write it back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    paths = parser.parse_args().notebooks or sorted(
        p for p in Path("nbs").rglob("*.ipynb") if "checkpoints" not in str(p)
    )
    for path in tqdm(paths, desc="notebooks"):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        client = StoringClient(
            notebook, timeout=900, kernel_name="python3", store_widget_state=False, resources=resources
        )
        try:
            client.execute()
        except Exception as error:
            sys.exit(f"{path}: {error}")
        join_streams(notebook)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        nbdev_clean(str(path))


if __name__ == "__main__":
    main()
