"""Count which photos can be aligned and why others cannot, and measure masks on toy cars; write sheets of accepted cars to look at.

    python studies/alignment.py --data common_cars_train.zip concept_cars_train.zip --network u2netp.onnx --aspect 1.4 --look /tmp/look

It writes data/records/align.json. Masks come from `--masks FOLDER` when they are there (one folder of a pack's name for each pack), else
they are computed and cached. The sheets show photos, never to be committed; `--bad` takes the numbers of the accepted cars that are bad,
with the reason, as somebody counted them on the sheets: `--bad 17:halo 44:part`.
"""
import argparse
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from freezed import describe_command
from PIL import Image
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import AlignConfig, align_car
from carproto.data.dataset import PictureStore, read_metadata
from carproto.data.masks import Aligner, load_segmenter
from carproto.files import load_json, save_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import sample_factors
from carproto.viz import image_grid, save_picture


def count_pack(path: str, aligner: Aligner, n: int | None, n_look: int) -> tuple[dict, list]:
    """Align the photos of a pack, all or n of them taken at random; return counts by source and reason, and accepted cars."""
    store, counts, reasons, cars = PictureStore(path), defaultdict(Counter), Counter(), []
    rows, order = read_metadata(store), np.random.default_rng(0).permutation(len(store.names))
    names = [store.names[i] for i in order][:n]
    aligner.prepare(store, names)
    seconds = 0.0
    for name in tqdm(names, desc=Path(path).stem):
        row, source = rows.get(name, {}), Path(name).name.split("_")[0]
        data = store.read(name)
        picture, start = open_picture(data), time.thread_time()
        try:
            car = aligner(picture, 128, store=store, name=name, data=data, row=row)
            counts[source]["accepted"] += 1
            if len(cars) < n_look:
                cars.append(car)
        except CarprotoError as error:
            counts[source]["rejected"] += 1
            reasons[str(error).split(" (")[0]] += 1
        seconds += time.thread_time() - start
    accepted = sum(count["accepted"] for count in counts.values())
    return {"n": len(names), "accepted": accepted, "by_source": {key: dict(value) for key, value in counts.items()},
            "reasons": dict(reasons.most_common()), "cpu_ms_a_picture_without_the_network": round(1000 * seconds / len(names), 2)}, cars  # fmt: skip


def measure_toys(network: str, n: int) -> dict:
    """Compare the network's masks of toy cars before noise with their true ones."""
    segment, overlaps, seconds = load_segmenter(path=network, threads=1), [], 0.0
    for i in tqdm(range(n), desc="toys"):
        picture, mask = render_car(sample_factors(9, i), 128)
        noise = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        busy = Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC)
        photo = Image.composite(Image.fromarray(picture), busy, Image.fromarray(mask.astype(np.uint8) * 255))
        start = time.thread_time()
        results = np.asarray(segment(photo)) > 127
        seconds += time.thread_time() - start
        overlaps.append(float((results & mask).sum() / (results | mask).sum()))
    quantiles = {f"quantile_{q}": round(float(np.quantile(overlaps, q)), 4) for q in (0.05, 0.25, 0.5, 0.75)}
    return {"n": n, "iou": quantiles, "cpu_seconds_a_mask": round(seconds / n, 3)}


def measure_mirror(n: int) -> dict:
    """Align toy cars of known view, seen from both sides, and count those that do not match the car that was never mirrored."""
    wrong, config = 0, AlignConfig()
    for i in range(n):
        factors = sample_factors(11, i, view=("front-right", "front-left")[i % 2])
        left = replace(factors, view="front-left", light=-factors.light) if i % 2 == 0 else factors
        cars = []
        for one in (factors, left):
            picture, mask = (Image.fromarray(part.astype(np.uint8) * scale) for part, scale in zip(render_car(one, 128), (1, 255)))
            cars.append(np.asarray(align_car(picture, mask, config, 64, mirrored=one.view == "front-right"), np.float32))
        wrong += np.abs(cars[0] - cars[1]).mean() > np.abs(cars[0][:, ::-1] - cars[1]).mean()
    return {"n": n, "wrong": int(wrong)}


def measure_photos(file: Path) -> dict:
    """Count, in the confusion of the cross-validated view classifier, the photos whose nose would be turned to the wrong side."""
    result = load_json(file)["with_unlabelled"]
    confusion, sides = np.array(result["confusion"]), {"left": (0, 1), "right": (3, 4)}  # views of either side, as `VIEWS` counts them
    right, wrong = (sum(confusion[np.ix_(sides[a], sides[b])].sum() for a in sides for b in sides if (a == b) == same) for same in (True, False))
    return {"n": int(right + wrong), "wrong": int(wrong), "share_right": round(float(right / (right + wrong)), 4)}


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="folders or zips of photos, with `view` or `view_guess` in metadata.jsonl")
    parser.add_argument("--network", required=True, help="file of u2netp")
    parser.add_argument("--masks", type=Path, help="folder that holds a folder of masks for each pack")
    parser.add_argument("--aspect", type=float, help="width by height of the photos when they were taken, where they were squashed")
    parser.add_argument("--n", type=int, help="photos of each pack, taken at random; all when left out")
    parser.add_argument("--n_toys", type=int, default=500)
    parser.add_argument("--look", type=Path, help="folder for sheets of accepted cars, 200 of each pack")
    parser.add_argument("--bad", nargs="*", default=[], help="numbers of bad ones on the sheets, with the reason, such as 17:halo")
    parser.add_argument("--n_looked", type=int, default=0, help="accepted cars that were looked at")
    parser.add_argument("--sample", default="", help="what the cars that were looked at are a sample of")
    parser.add_argument("--out", type=Path, default=Path("data/records/align.json"))
    arguments = parser.parse_args()
    record = {"command": describe_command(), "packs": {}}
    for path in arguments.data:
        masks = arguments.masks and arguments.masks / Path(path).stem
        aligner = Aligner(AlignConfig(aspect=arguments.aspect), segment=arguments.network, masks=masks)
        record["packs"][Path(path).stem], cars = count_pack(path, aligner, arguments.n, 200)
        if arguments.look:
            arguments.look.mkdir(parents=True, exist_ok=True)
            for start in range(0, len(cars), 100):
                sheet = image_grid([car.resize((96, 96)) for car in cars[start : start + 100]], 10)
                save_picture(sheet, arguments.look / f"{Path(path).stem}_{start}.png")
    record["look"] = {"n": arguments.n_looked, "sample": arguments.sample, "bad": arguments.bad}
    record["mirror_toys"] = measure_mirror(200)
    record["mirror_photos"] = measure_photos(Path("data/records/views.json"))
    record["toys"] = measure_toys(arguments.network, arguments.n_toys)
    record["machine"] = describe_environment()
    save_json(record, arguments.out)
    print(record)


if __name__ == "__main__":
    main()
