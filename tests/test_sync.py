"""Everything that is generated from the notebooks is fresh, on a copy of the tree; planted mistakes are seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("carproto", "nbs", "tools", "settings.ini", "setup.py", "pyproject.toml", "README.md")
SCRATCH = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy what generates and what is generated."""
    for part in PARTS:
        source, target = ROOT / part, tmp_path / "tree" / part
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target, ignore=SCRATCH) if source.is_dir() else shutil.copy(source, target)
    return tmp_path / "tree"


def run_python(tree: Path, *arguments: str) -> None:
    """Run Python in the copy, without the user's own nbdev settings."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tree.parent / "no-config"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def find_changes(tree: Path) -> set[str]:
    """Generate everything and name the files that changed, came or went."""
    before = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    run_python(tree, "tools/sync.py")
    after = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def find_notebook(tree: Path, module: str) -> Path:
    """Find the notebook that writes a module."""
    return next(
        path for path in tree.glob("nbs/*/*.ipynb") if f'#| default_exp {module}"' in path.read_text(encoding="utf-8")
    )


def edit_notebook(path: Path, change) -> None:
    """Load a notebook, change it, save it as nbdev does."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def test_generated_files_are_fresh(tree):
    changes = find_changes(tree)
    assert not changes, f"not what the notebooks say (run `make sync`): {sorted(changes)}"


def test_planted_mistakes_are_seen(tree):
    """An edited module, a deleted notebook, a notebook that was not cleaned, a README behind its notebook."""
    edited = tree / "carproto/images.py"
    edited.write_text(
        edited.read_text(encoding="utf-8").replace("too few to show", "too small to show"), encoding="utf-8"
    )
    find_notebook(tree, "toycars.dataset").unlink()
    edit_notebook(
        find_notebook(tree, "viz"), lambda notebook: notebook["metadata"].update(language_info={"name": "python"})
    )
    edit_notebook(tree / "nbs/index.ipynb", lambda notebook: notebook["cells"][0]["source"].append(" And more."))
    changes = find_changes(tree)
    viz = find_notebook(tree, "viz").relative_to(tree).as_posix()
    assert changes >= {
        "carproto/images.py",
        "carproto/toycars/dataset.py",
        "carproto/_modidx.py",
        viz,
        "README.md",
        "nbs/sidebar.yml",
    }
    assert not (tree / "carproto/toycars/dataset.py").exists()
    assert not find_changes(tree), "generating twice is not the same as once"


def test_broken_notebook_keeps_the_modules(tree):
    """When the export fails, the modules are still there."""
    core = (tree / "carproto/core.py").read_bytes()
    find_notebook(tree, "core").write_text("{", encoding="utf-8")
    with pytest.raises(AssertionError):
        run_python(tree, "tools/sync.py")
    assert (tree / "carproto/core.py").read_bytes() == core
