"""The record of a study: command, machine, commit and results, as one JSON file or as JSON lines."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from carproto.config import CarprotoError
from carproto.files import atomic_path, load_json, save_json
from carproto.run import RunFolder, describe_environment


def describe_command() -> str:
    """Return the command as given, with the names of files in place of their paths."""
    return " ".join(
        [
            "python",
            f"studies/{Path(sys.argv[0]).name}",
            *(Path(word).name if "/" in word else word for word in sys.argv[1:]),
        ]
    )


def save_record(results: dict, path: Path) -> Path:
    """Write a record: the command first, then the results, the machine last; return its path."""
    return save_json({"command": describe_command(), **results, "machine": describe_environment()}, path)


def save_and_print(record: dict, path: Path) -> None:
    """Write a record and print its entries."""
    save_record(record, path)
    for name, value in record.items():
        print(f"{name}: {value}")


class Study:
    """The record of a study in cells: NAME.json holds what they share, NAME.jsonl a line for each cell."""

    def __init__(self, path: Path, config: dict):
        self.path, self.about_path, self.config = path, path.with_suffix(".json"), config
        self.rows = RunFolder(path.parent).stats(path.name)
        self.commit = describe_environment()["commit"]
        if self.is_begun:
            known = load_json(self.about_path)
            other = [name for name, value in json.loads(json.dumps(config)).items() if known.get(name) != value]
            if other:
                raise CarprotoError(
                    f"{self.about_path} was made with another {', '.join(other)}: "
                    "take another --out, or remove that record"
                )
        selected = "".join(json.dumps(row) + "\n" for row in self.rows)
        if path.exists() and path.read_text(encoding="utf-8") != selected:  # a killed session left half a line
            with atomic_path(path) as temporary:
                temporary.write_text(selected, encoding="utf-8")

    @property
    def is_begun(self) -> bool:
        """Whether the shared part is written."""
        return self.about_path.exists()

    def begin(self, **notes) -> None:
        """Write the shared part."""
        save_record({**self.config, **notes}, self.about_path)

    def lacks(self, cell: dict) -> bool:
        """Whether a cell is still to be done."""
        return not any(cell.items() <= row.items() for row in self.rows)

    def add(self, row: dict) -> None:
        """Append a line."""
        self.rows.append({**row, "commit": self.commit})
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(self.rows[-1]) + "\n")


def run_or_exit(run: Callable, *arguments, stopped: str = "stopped", **options) -> object:
    """Return what a study's function returns; exit with the study's name and one line for a mistake."""
    name = Path(sys.modules[run.__module__].__file__).stem
    try:
        return run(*arguments, **options)
    except CarprotoError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")


def run_or_report(run: Callable[[argparse.Namespace], Study], arguments: argparse.Namespace, unit: str) -> None:
    """Run a study in cells and count them; exit with one line for a mistake."""
    stopped = f"stopped; the {unit} that are done are in the record; the same command resumes"
    study = run_or_exit(run, arguments, stopped=stopped)
    print(f"{len(study.rows)} {unit} in {study.path}")


def mask_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of what the studies of masks read, their seed and where they write weights."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the packs as zip")
    parser.add_argument("--masks", type=Path, required=True, help="folder that holds a folder of masks for each pack")
    parser.add_argument("--labels", type=Path, default=Path("data/mask_classifier/labels.json"))
    parser.add_argument("--aspect", type=float, default=1.4, help="width by height of the photos when they were taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors and config.json")
    return parser
