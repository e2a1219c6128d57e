"""Make a release of two runs and their encoder: int8 or fp16 weights in data/NAME, and the runs' records.

    python tools/release.py toy64 --common runs/common --futuristic runs/futuristic --encoder runs/encoder
    python tools/release.py toy64 --editor  # fits the body editor of the release anew, and leaves the rest

The model card, data/NAME/README.md, is written by hand, and stays. The table of SHA-256 in
nbs/0_base/06_releases.ipynb is written anew; run `python tools/sync.py` afterwards, and tag the commit as that
notebook's `REVISION`.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from carproto.app.body import find_measure, fit_body
from carproto.app.pipeline import CarPipeline
from carproto.config import CarprotoError
from carproto.files import folder_aside, load_json, save_json
from carproto.gan.sngan import load_generator, save_discriminator, save_generator
from carproto.gan.train import find_generator, load_discriminator
from carproto.latent.edit import save_editor
from carproto.latent.encoder import load_encoder, save_encoder
from carproto.latent.train_encoder import evaluate_encoder
from carproto.releases import hash_file
from carproto.weights import IN_REPOSITORY, WEIGHT_PRECISIONS

RECORD = ("config.json", "data.json", "env.json", "sessions.jsonl", "stats.jsonl", "evaluation.json")
PATH_FIELDS = ("parent", "data", "heldout", "train", "extractor")  # fields that may hold a path
LIMIT_MB = 24  # of all photo pairs of a folder together; what git clones stays small


def release_generator(run: Path, folder: Path, precision: str) -> None:
    """Store the generator that a run is remembered for."""
    source = find_generator(run)
    text, data = load_json(source / "config.json"), load_json(run / "data.json")
    about = {name: text[name] for name in ("steps", "kid") if name in text}
    if data.get("frame") is not None:
        about["frame"] = data["frame"]
    save_generator(load_generator(source, "cpu"), folder, precision=precision, about=about)


def release_encoder(run: Path, folder: Path, generators: list, precision: str) -> None:
    """Store the encoder, bound to the stored common generator, with its evaluation on the stored generators."""
    text = load_json(run / "encoder" / "config.json")
    E = load_encoder(run / "encoder", device="cpu")
    E.generator = generators[0].fingerprint()
    save_encoder(E, folder, precision=precision)
    E = load_encoder(folder, fingerprint=E.generator, device="cpu")
    photos = {
        name: text[name] for name in text if name.startswith("photo_") or name in ("n_photos", "steps", "seconds")
    }
    save_encoder(E, folder, precision=precision, about={**photos, **evaluate_encoder(E, generators)})


def release_editor(folder: Path) -> None:
    """Fit the body editor of a stored pair, where its cars can be measured, and store it beside them."""
    pipeline = CarPipeline.from_pretrained(folder)
    if find_measure(pipeline) is None:
        print(f"{folder}: no body editor, since its cars cannot be measured")
        return
    try:
        editor = fit_body(pipeline)
    except CarprotoError as error:  # a young generator, whose images are no cars yet
        print(f"{folder}: no body editor, since {error}")
        return
    save_editor(editor, folder / "editor")
    for name, error in zip(editor.names, editor.error.tolist()):
        use = "editable" if name in editor.editable else "held"
        print(f"{name}: median error {error:.2f} of the request, {use}")


def copy_record(run: Path, folder: Path) -> None:
    """Copy what a figure or a table needs of a run; of data paths, only the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    for name in ("data.json", "evaluation.json"):
        if (folder / name).exists():
            text = load_json(folder / name)
            save_json(
                {
                    key: Path(value).name if key in PATH_FIELDS and "/" in value else value
                    for key, value in text.items()
                },
                folder / name,
            )


def replace_folder(made: Path, folder: Path) -> None:
    """Put a whole new release in the place of the old one, whose model card stays."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    if (folder / "README.md").exists():
        shutil.copyfile(folder / "README.md", made / "README.md")
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def list_hashes(data: Path) -> str:
    """Write the SHA-256 of all released files as the entries of a dict."""
    weights = [path.parent for path in data.rglob("model.safetensors") if "milestones" not in path.parts]
    lines, folders = [], {folder.relative_to(data).as_posix(): folder for folder in weights}
    for name, folder in sorted(folders.items()):
        files = [f'        "{file}": "{hash_file(folder / file)}",' for file in ("config.json", "model.safetensors")]
        lines += [f'    "{name}": {{', *files, "    },"]
    return "\n".join(lines)


def write_hashes(data: Path, notebook: Path) -> None:
    """Put the SHA-256 of all released files into the table that downloads are compared with."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    (cell,) = (cell for cell in content["cells"] if "\nRELEASES = {" in "".join(cell["source"]))
    table = re.compile(r"(\nRELEASES = \{[^\n]*\n).*?(\n\}\n)", re.DOTALL)
    source = table.sub(lambda results: results[1] + list_hashes(data) + results[2], "".join(cell["source"]))
    cell["source"] = source.splitlines(keepends=True)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write data/NAME."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the release, such as toy64")
    for part in ("common", "futuristic", "encoder"):
        parser.add_argument(f"--{part}", type=Path, help="a run's folder")
    parser.add_argument(
        "--precision", choices=WEIGHT_PRECISIONS, help="of the weights; default: int8 for photo pairs, fp16 for others"
    )
    parser.add_argument("--editor", action="store_true", help="fit the body editor of the stored release, and no more")
    parser.add_argument("--probe", type=Path, help="folder of a futurism probe; default: that of the release before")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where releases lie")
    arguments = parser.parse_args(argv)
    folder = arguments.data / arguments.name
    if arguments.editor:
        release_editor(folder)
    else:
        make_release(arguments, folder)
    if arguments.data.resolve() == IN_REPOSITORY:
        write_hashes(IN_REPOSITORY, IN_REPOSITORY.parent / "nbs" / "0_base" / "06_releases.ipynb")
    print(describe_size(arguments.data, arguments.name))


def describe_size(data: Path, name: str) -> str:
    """Say how large a release is, and of a photo pair, whether all of them together stay below their limit."""

    def measure(folder: Path) -> float:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6

    text = f"{data / name}: {measure(data / name):.1f} MB"
    if not name.startswith("photo"):
        return text
    total = sum(map(measure, data.glob("photo*")))
    use = "more than" if total > LIMIT_MB else "of at most"
    return f"{text}; all photo pairs: {total:.1f} MB, {use} {LIMIT_MB} MB"


def make_release(arguments: argparse.Namespace, folder: Path) -> None:
    """Make a whole release of the runs, and put it in the place of the old one."""
    if None in (arguments.common, arguments.futuristic, arguments.encoder):
        raise CarprotoError("a release needs --common, --futuristic and --encoder; --editor alone fits its editor anew")
    bound = load_json(arguments.encoder / "encoder" / "config.json")["generator"]
    if load_generator(find_generator(arguments.common), "cpu").fingerprint() != bound:
        raise CarprotoError(
            f"{arguments.encoder} was trained for generator {bound}, which is not the one of {arguments.common}"
        )
    precision = arguments.precision or ("int8" if arguments.name.startswith("photo") else "fp16")
    with folder_aside(folder.with_name(f"{folder.name}.new")) as aside:
        for part in ("common", "futuristic"):
            release_generator(getattr(arguments, part), aside / part, precision)
        D = load_discriminator(arguments.common, "cpu")  # whose features refinement compares
        save_discriminator(D, aside / "common" / "discriminator", precision=precision)
        release_encoder(
            arguments.encoder,
            aside / "encoder",
            [load_generator(aside / part, "cpu") for part in ("common", "futuristic")],
            precision,
        )
        for part in ("common", "futuristic", "encoder"):
            copy_record(getattr(arguments, part), aside / "record" / part)
        probe = arguments.probe or folder / "probe"
        if probe.exists():
            shutil.copytree(probe, aside / "probe")
    replace_folder(folder.with_name(f"{folder.name}.new"), folder)
    release_editor(folder)


if __name__ == "__main__":
    main()
