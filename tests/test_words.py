"""The field's words: banned words in names, prose, help and README, with a short list of what is allowed."""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(path for path in (ROOT / "carproto").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))

NAMES = re.compile(  # parts of identifiers
    r"^(draw_latents|drawing_generator|eyes?|toyreader|readers?|weave|forms|dial|dialled|route|journey|album|guard|"
    r"usual|doubtful|likeness|variety|"
    r"leaning|judge|judged|skin|told|ways|compact|IndexStream|Feed|read_car|read_pictures|day)$"
)
PROSE = {  # pattern in running text: what to write
    r"\bcodes?\b(?! (?:cell|execut|span|block)s?)": "latent, latent code, z",
    r"\b(?:drawn|draws?|drawings?) (?:cars?|pictures?|images?)\b": "generated cars, samples; toy cars are rendered",
    r"\bjudg(?:e|es|ed|ing)\b": "evaluate, score",
    r"\b(?:averaged generator|generator's average)\b": "EMA",
    r"\beyes?\b": "perceptual metric, features",
    r"\b(?:toy )?readers?\b": "feature extractor, factor regressor",
    r"\b(?:one|single)[ -]piece\b|\bweaves?\b|\bwoven\b": "fused, interleave",
    r"\b(?:dials?|dialled|journeys?|albums?)\b": "calibration, recipe, photo browser",
    r"\broutes?\b": "path, path planning",
    r"(?<!channel )\bgains\b": "channel gains",
    r"\blikeness\b": "similarity",
    r"\bskin\b": "fine levels",
    r"\bdoubtful\b": "outliers",
    r"\bseed system\b|\bsystem of 2022\b": "the 2022 baseline",
    r"\bguests?\b|\bdesks?\b|\bdiar(?:y|ies)\b|\bcellars?\b": "no metaphor",
    r"\blean(?:s|ing)? (?:to|towards) (?:the|a) train": "nearest-neighbour distance ratio",
}
ALLOWED = {  # text around a hit that makes it right
    "source code",
    "exit code",
    "status code",
    "code runs",
    "QR code",
    "VS Code",
    "latent code",
    "character code",
    "no code is executed",
    "without executing code",
}
ALLOWED_NAMES = {
    "eye",
    "BufferedReader",
    "DeadlineReader",
    "DictReader",
    "HTMLParser",
}  # torch.eye, io's own kinds of readers


def name_of(path: Path) -> str:
    """Name a file from the root on."""
    return path.relative_to(ROOT).as_posix()


def find_banned(text: str) -> list[str]:
    """List banned words in prose, each with what stands around it."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>]+>|^```.*?^```", " ", text, flags=re.MULTILINE | re.DOTALL)
    hits = []
    for pattern, better in PROSE.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            around = " ".join(text[max(0, match.start() - 25) : match.end() + 25].split())
            if not any(allowed in around for allowed in ALLOWED):
                hits.append(f'{match[0]!r} in "{around}": write {better}')
    return hits


def find_names(source: str) -> set[str]:
    """List identifiers with a banned part."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string not in ALLOWED_NAMES:
            parts = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", token.string)
            if NAMES.match(token.string) or any(NAMES.match(part.lower()) for part in parts):
                found.add(token.string)
    return found


def read_cells(path: Path, kind: str) -> list[str]:
    """Read the sources of one kind of cells."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_speaks_the_fields_words(path):
    hits = [hit for source in read_cells(path, "markdown") for hit in find_banned(source)]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_names_in_notebooks(path):
    sources = [source for source in read_cells(path, "code") if not re.search(r"^\s*[%!]", source, re.MULTILINE)]
    names = set().union(*map(find_names, sources)) if sources else set()
    assert not names, f"rename {sorted(names)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_comments_and_messages(path):
    hits = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT or token.type == tokenize.STRING and " " in token.string:
            hits += find_banned(token.string)
    assert not hits, "\n".join(hits)


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("data/*/README.md"), *ROOT.glob("studies/*.md")]


@pytest.mark.parametrize("path", sorted(TEXTS), ids=name_of)
def test_texts(path):
    hits = find_banned(path.read_text(encoding="utf-8"))
    assert not hits, "\n".join(hits)


def test_public_names():
    """Names that a reader would search for: none of the old ones is exported anywhere."""
    names = set()
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names |= set(ast.literal_eval(node.value))
    bad = {name for name in names if find_names(name)}
    assert not bad, f"rename {sorted(bad)}"


def test_the_finder_finds_and_forgives():
    assert (
        find_banned("The dial moves the code.") and find_banned("Gains of a block") and find_banned("an eye for cars")
    )
    assert not find_banned("Channel gains scale a block; `codes` is quoted; the exit code is 1.")
