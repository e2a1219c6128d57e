"""The package says the same thing everywhere, and what it promises to install is there."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import carproto

ROOT = Path(__file__).resolve().parents[1]
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]
COMMANDS = dict(command.split("=") for command in SETTINGS["console_scripts"].split())


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    versions = {
        SETTINGS["version"],
        carproto.__version__,
        citation["version"],
        newest,
        distribution("carproto").version,
    }
    assert len(versions) == 1, versions
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:2] == ["Apache", "License"] and citation[
        "license"
    ] == "Apache-2.0"


def test_installed_requirements_are_those_of_settings():
    wanted = {
        (Requirement(text).name, str(Requirement(text).specifier), "") for text in SETTINGS["requirements"].split()
    }
    extras = {
        key.removesuffix("_requirements"): SETTINGS[key].split() for key in SETTINGS if key.endswith("_requirements")
    }
    wanted |= {
        (Requirement(text).name, str(Requirement(text).specifier), extra)
        for extra, texts in extras.items()
        for text in texts
    }
    results = set()
    for requirement in map(Requirement, distribution("carproto").requires):
        extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker))
        results.add((requirement.name, str(requirement.specifier), extra[1] if extra else ""))
    assert wanted <= results, f"installed from older settings (remove .venv/.dev, run make again): {wanted - results}"


def test_torch_is_not_pinned():
    """Colab and other hosts own torch: an upper bound or an exact version would replace it."""
    for requirement in map(Requirement, SETTINGS["requirements"].split()):
        if requirement.name in ("torch", "torchvision", "numpy", "fastcore"):
            assert {part.operator for part in requirement.specifier} <= {">="}, requirement


@pytest.mark.parametrize("name", COMMANDS)
def test_command_can_be_loaded(name):
    (entry,) = entry_points(group="console_scripts", name=name)
    assert entry.value == COMMANDS[name] and callable(entry.load())


def test_every_module_has_a_notebook():
    for module in (ROOT / "carproto").rglob("*.py"):
        if module.name not in ("__init__.py", "__main__.py", "_modidx.py"):
            source = re.search(r"File to edit: (\.\./\S+)\.$", module.read_text(encoding="utf-8"), re.MULTILINE)
            assert source and (module.parent / source[1]).exists(), f"{module.name} is not exported from a notebook"


def test_modules_need_only_what_a_user_installs():
    """Every module imports without the extras: what they bring is imported inside the function that needs it."""
    names = {"pillow": "PIL", "torch-fidelity": "torch_fidelity"}
    at_hand = {names.get(name, name) for name in (Requirement(text).name for text in SETTINGS["requirements"].split())}
    at_hand |= {"IPython"}  # ipywidgets needs it
    for module in (ROOT / "carproto").rglob("*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            extra = {root.split(".")[0] for root in roots} - at_hand - sys.stdlib_module_names - {"carproto"}
            assert not extra, f"{module.name} imports {extra} at its top"


def test_page_is_packaged():
    """`carproto export --page` copies its files from the installed package."""
    from carproto.app.live_page import PAGE_FILES

    assert {path.name for path in (ROOT / "carproto/app/live").iterdir()} == set(PAGE_FILES)
    assert '"carproto.app": ["live/*"]' in (ROOT / "setup.py").read_text(encoding="utf-8")
