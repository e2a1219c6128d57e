"""Make a release of a pair of runs and their encoder: half-precision weights in data/NAME, graded as they are stored, and the runs' records.

    python tools/release.py toy64 --common runs/common --futuristic runs/futuristic --encoder runs/encoder

The model card, data/NAME/README.md, is written by hand.
"""
import argparse
import shutil
from pathlib import Path

from carproto.core import CarprotoError, load_json, save_json
from carproto.encode import grade_encoder
from carproto.encoder import load_encoder, save_encoder
from carproto.sngan import load_generator, save_discriminator, save_generator
from carproto.train import best_generator, load_discriminator

RECORD = ("config.json", "data.json", "env.json", "sessions.jsonl", "stats.jsonl", "evaluation.json")
PLACES = ("parent", "data", "heldout", "train", "extractor")  # fields that may hold a path
LIMIT_MB = 20


def release_generator(run: Path, folder: Path) -> None:
    """Store the generator that a run is remembered for, and the discriminator, whose eye refinement needs."""
    place = "best" if (run / "best").exists() else "final"
    told = load_json(run / place / "config.json")
    save_generator(best_generator(run, "cpu"), folder, half=True, about={k: told[k] for k in ("steps", "kid") if k in told})
    save_discriminator(load_discriminator(run, "cpu"), folder / "discriminator", half=True)


def release_encoder(run: Path, folder: Path, generators: list) -> None:
    """Store the encoder, bound to the stored common generator, with the grades of its codes on the stored generators."""
    told = load_json(run / "encoder" / "config.json")
    E = load_encoder(run / "encoder", device="cpu")
    E.generator = generators[0].fingerprint()
    save_encoder(E, folder, half=True)
    E = load_encoder(folder, fingerprint=E.generator, device="cpu")
    photos = {name: told[name] for name in told if name.startswith("photo_") or name in ("n_photos", "steps", "seconds")}
    save_encoder(E, folder, half=True, about={**photos, **grade_encoder(E, generators)})


def copy_record(run: Path, folder: Path) -> None:
    """Copy what a figure or a table needs of a run; of the places where data lay, only the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    for name in ("data.json", "evaluation.json"):
        if (folder / name).exists():
            told = load_json(folder / name)
            save_json({key: Path(value).name if key in PLACES and "/" in value else value for key, value in told.items()}, folder / name)


def main(argv: list[str] | None = None) -> None:
    """Write data/NAME."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the release, such as toy64")
    for part in ("common", "futuristic", "encoder"):
        parser.add_argument(f"--{part}", type=Path, required=True, help="a run's folder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where releases lie")
    arguments = parser.parse_args(argv)
    folder, bound = arguments.data / arguments.name, load_json(arguments.encoder / "encoder" / "config.json")["generator"]
    if best_generator(arguments.common, "cpu").fingerprint() != bound:
        raise CarprotoError(f"{arguments.encoder} reads generator {bound}, which is not the one of {arguments.common}")
    for part in ("common", "futuristic"):
        release_generator(getattr(arguments, part), folder / part)
    release_encoder(arguments.encoder, folder / "encoder", [load_generator(folder / part, "cpu") for part in ("common", "futuristic")])
    for part in ("common", "futuristic", "encoder"):
        copy_record(getattr(arguments, part), folder / "record" / part)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{folder}: {size:.1f} MB" + (f", more than {LIMIT_MB} MB" if size > LIMIT_MB else ""))


if __name__ == "__main__":
    main()
