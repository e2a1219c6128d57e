"""Measure how many altered copies of photos are found, how many pairs are claimed, and what it costs.

python studies/near_duplicates.py --photos cars.zip                      # writes data/records/duplicates.json
    python studies/near_duplicates.py --photos cars.zip --sheets /tmp/pairs   # with sheets of the claimed pairs
"""

import argparse
import io
import time
from functools import partial
from pathlib import Path

import numpy as np
from _record import save_and_print
from PIL import Image, ImageEnhance
from tqdm import tqdm

from carproto.data.comparison import hash_pictures, make_thumbnails
from carproto.data.duplicates import _trimmed_hashes, near_duplicates
from carproto.data.store import PictureStore
from carproto.images import fit_square, open_picture
from carproto.viz import image_grid, save_picture


def recompress(picture: Image.Image, quality: int) -> Image.Image:
    """Return what JPEG leaves of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return open_picture(buffer.getvalue())


def trim(picture: Image.Image, rng: np.random.Generator, most: float) -> Image.Image:
    """Cut up to the share `most` off each of the four sides."""
    left, right, top, bottom = rng.uniform(0, most, 4)
    width, height = picture.size
    return picture.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def resize(picture: Image.Image, factor: float) -> Image.Image:
    """Resize a picture by a factor."""
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)


def brighten(picture: Image.Image, factor: float) -> Image.Image:
    """Multiply all values, clipping at white."""
    return ImageEnhance.Brightness(picture).enhance(factor)


KINDS = {
    "exact": lambda picture, rng: picture,
    "resized (x0.4 to x2)": lambda picture, rng: resize(picture, 2 ** rng.uniform(-1.32, 1)),
    "recompressed (JPEG quality 20 to 80)": lambda picture, rng: recompress(picture, int(rng.integers(20, 81))),
    "cropped (up to 5 % of each side)": lambda picture, rng: trim(picture, rng, 0.05),
    "cropped (5 % of every side)": lambda picture, rng: picture.crop(
        [round(v * s) for v, s in zip((0.05, 0.05, 0.95, 0.95), picture.size * 2)]
    ),
    "cropped more (up to 10 % of each side)": lambda picture, rng: trim(picture, rng, 0.10),
    "brightened (x1.1 to x1.5, clipped)": lambda picture, rng: brighten(picture, rng.uniform(1.1, 1.5)),
    "darkened (x0.5 to x0.9)": lambda picture, rng: brighten(picture, rng.uniform(0.5, 0.9)),
    "all at once (milder)": lambda picture, rng: recompress(
        brighten(resize(trim(picture, rng, 0.04), rng.uniform(0.6, 1.2)), rng.uniform(1, 1.25)),
        int(rng.integers(40, 81)),
    ),
}


def look(pictures: list) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes and thumbnails."""
    return hash_pictures(pictures), make_thumbnails(pictures)


def measure_recall(photos: list, looks: tuple, n: int, seed: int) -> dict:
    """Return the share of found copies of each kind; a copy is found when it shares a cluster with its original."""
    chosen = np.random.default_rng(seed).choice(len(photos), n, replace=False)
    shares = {}
    for kind, spoil in tqdm(KINDS.items(), desc="kinds of copies"):
        rng = np.random.default_rng([seed, 1])
        copies = look([spoil(photos[i], rng) for i in chosen])
        group = {
            i: k for k, cluster in enumerate(near_duplicates(*map(np.concatenate, zip(looks, copies)))) for i in cluster
        }
        results = [i in group and group[i] == group.get(len(photos) + k) for k, i in enumerate(chosen)]
        shares[kind] = sum(results) / n
    return shares


def draw_textures(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw thumbnails of clouds, whose detail falls off as in photos; none resembles another."""
    along = np.fft.fftfreq(32)
    radius = np.hypot(along[:, None], along)
    radius[0, 0] = np.inf
    many = np.empty((n, 3, 32, 32), np.uint8)
    for k in range(0, n, 5000):
        white = np.fft.fft2(rng.standard_normal((min(5000, n - k), 3, 32, 32)))
        clouds = np.fft.ifft2(white * radius**-1.3).real
        many[k : k + 5000] = np.clip(128 + 48 * clouds / clouds.std((1, 2, 3), keepdims=True), 0, 255)
    return many


def draw_pieces(n: int, rng: np.random.Generator, thumbnails: np.ndarray) -> np.ndarray:
    """Cut thumbnails of random pieces out of those of photos; the more there are, the more of them resemble others."""
    many = np.empty((n, 3, 32, 32), np.uint8)
    for k, (i, x, y) in enumerate(zip(*rng.integers([[len(thumbnails)], [17], [17]], size=(3, n)))):
        many[k] = thumbnails[i, :, y : y + 16, x : x + 16].repeat(2, 1).repeat(2, 2)[:, :, :: rng.choice((-1, 1))]
    return many


def measure_cost(thumbnails: np.ndarray, sizes: tuple, seed: int) -> dict:
    """Time `near_duplicates` on random textures and on crops of photos; every twentieth has a copy."""
    cost = {}
    for kind, draw in {
        "textures": draw_textures,
        "pieces of photos": partial(draw_pieces, thumbnails=thumbnails),
    }.items():
        for n in sizes:
            many = draw(n, np.random.default_rng(seed))
            many[::20] = np.clip(many[1::20] * 1.1, 0, 255).astype(np.uint8)
            hashes = _trimmed_hashes(many, 0)
            start = time.perf_counter()
            clusters = near_duplicates(hashes, many)
            cost.setdefault(kind, {})[str(n)] = {
                "seconds": round(time.perf_counter() - start, 2),
                "clusters": len(clusters),
            }
            print(f"{n} {kind}: {cost[kind][str(n)]}", flush=True)
    return cost


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True, help="folder or zip of photos")
    parser.add_argument("--prefix", default="photo_", help="of the file names that are looked at")
    parser.add_argument("--n", type=int, default=500, help="photos to copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--wrong", type=int, help="how many of the claimed pairs a person found wrong; goes into the record"
    )
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of the claimed pairs")
    parser.add_argument("--out", type=Path, default=Path("data/records/duplicates.json"))
    arguments = parser.parse_args()
    store = PictureStore(arguments.photos)
    names = [name for name in store.names if Path(name).name.startswith(arguments.prefix)]
    photos = [open_picture(store.read(name)) for name in tqdm(names, desc="decode")]
    start = time.perf_counter()
    looks = look(photos)
    seconds = time.perf_counter() - start
    clusters = near_duplicates(*looks)
    record = {
        "photos": Path(arguments.photos).name,
        "n_photos": len(photos),
        "n_copied": arguments.n,
        "seed": arguments.seed,
        "found": measure_recall(photos, looks, arguments.n, arguments.seed),
        "claimed": {
            "clusters": len(clusters),
            "pictures": sum(map(len, clusters)),
            "pairs": sum(len(cluster) - 1 for cluster in clusters),
            "pairs_wrong_on_inspection": arguments.wrong,
        },
        "photos_per_second": round(len(photos) / seconds),
        "cost": measure_cost(looks[1], (10_000, 30_000, 100_000), arguments.seed),
    }
    if arguments.sheets:
        pairs = [(cluster[0], i) for cluster in clusters for i in cluster[1:]]
        for start in range(0, len(pairs), 48):
            cells = [fit_square(photos[i], 128, "letterbox") for pair in pairs[start : start + 48] for i in pair]
            save_picture(image_grid(cells, 12, 0.62), arguments.sheets / f"pairs_{start:05d}.jpg")
    save_and_print(record, arguments.out)


if __name__ == "__main__":
    main()
