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


def run_or_report(run: Callable[[argparse.Namespace], Study], arguments: argparse.Namespace, unit: str) -> None:
    """Run a study in cells; report a mistake in one line."""
    name = Path(sys.modules[run.__module__].__file__).stem
    try:
        study = run(arguments)
    except CarprotoError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; the {unit} that are done are in the record; the same command resumes")
    print(f"{len(study.rows)} {unit} in {study.path}")
