"""Measure photos curated a second, with and without the view classifier, small and at a crawl's size.

    python studies/curation.py --photos cars.zip --classifier views/ --backbone mobilenet_v2.safetensors

The record is data/records/curate.json.

The time is that of `curate`, from reading the files to writing the verdicts; unpacking and enlarging come before.
Needs a quiet machine."""

import argparse
import io
import tempfile
import time
import zipfile
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import torch
from _record import save_record
from PIL import Image

from carproto.data.curate import count_reasons, curate
from carproto.data.views import load_view_classifier
from carproto.images import open_picture

LARGE = 640, 480  # pixels of a photo of a crawl


def write_photo(folder: Path, large: bool, named: tuple[str, bytes]) -> None:
    """Write one photo, as it is or enlarged to a JPEG."""
    name, content = named
    if large:
        buffer, name = io.BytesIO(), str(Path(name).with_suffix(".jpg"))
        open_picture(content).resize(LARGE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        content = buffer.getvalue()
    (folder / Path(name).name).write_bytes(content)


def unpack(path: str, n: int, folder: Path, large: bool) -> None:
    """Write the first n photos of a zip into a folder."""
    with zipfile.ZipFile(path) as opened, Pool() as pool:
        names = sorted(name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")))[
            :n
        ]
        pool.map(partial(write_photo, folder, large), ((name, opened.read(name)) for name in names), chunksize=64)


def time_curate(photos: str, n: int, classify_view, large: bool) -> dict:
    """Curate n photos once; return the rate and what became of them."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(photos, n, Path(folder), large)
        start = time.perf_counter()
        verdicts = curate(folder, classify_view=classify_view)
        seconds = time.perf_counter() - start
    kinds = {kind: count for kind, count in count_reasons(verdicts).most_common()}
    return {
        "n": len(verdicts),
        "seconds": round(seconds, 1),
        "per_second": round(len(verdicts) / seconds, 1),
        "rejected": kinds,
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True, help="zip of photos")
    parser.add_argument(
        "--classifier",
        required=True,
        help="folder that `save_view_classifier` wrote, see studies/view_accuracy.py --save",
    )
    parser.add_argument("--backbone", help="file of MobileNetV2 weights; none downloads torchvision's")
    parser.add_argument(
        "--n", type=int, default=12_000, help="photos; with the classifier, and of the large ones, a quarter of it"
    )
    parser.add_argument("--out", type=Path, default=Path("data/records/curate.json"))
    arguments = parser.parse_args()
    classify = load_view_classifier(arguments.classifier, arguments.backbone)
    record = {"n_threads": torch.get_num_threads(), "runs": []}
    for size, large in (("128x128, as they are", False), (f"{LARGE[0]}x{LARGE[1]}, enlarged", True)):
        for classify_view in (None, classify):
            n = arguments.n // (1 if not large and classify_view is None else 4)
            results = time_curate(arguments.photos, n, classify_view, large)
            record["runs"].append({"photos": size, "with_classifier": classify_view is not None, **results})
    save_record(record, arguments.out)
    for run in record["runs"]:
        print(run)


if __name__ == "__main__":
    main()
