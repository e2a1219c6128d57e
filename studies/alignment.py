"""Count which photos can be aligned, measure masks and mirroring on toy cars, and write sheets of accepted cars.

    python studies/alignment.py --data /photos --masks /masks --network u2netp.onnx --aspect 1.4 --look /tmp/look
    python studies/alignment.py --parts inspection --bad 17:halo 44:part

It writes data/records/align.json, one entry a part: `packs`, `limits`, `mirror_toys`, `mirror_photos`,
`masks_of_toys`, `timing`, `engines`, `inspection`. Each entry has its command, commit and machine; `--parts` makes
some of them anew. `limits` counts what tighter limits of the defect score would accept, and writes sheets of that.
`engines` compares the masks of ONNX Runtime and OpenVINO. Masks come from `--masks`, a folder of a pack's name for each
pack, as `load_segmenter` makes them, or are computed and cached. The sheets show photos, which are never committed.
`--bad` takes the numbers of the cars that somebody rejected on the
sheets, with the reason: part, second, halo or other."""

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from _record import describe_command
from PIL import Image, ImageDraw
from tqdm import tqdm

from carproto.config import CarprotoError, MaskEngine
from carproto.data.align import AlignConfig, align_car
from carproto.data.mask_classifier import classifier_inputs, load_mask_classifier, score_mask
from carproto.data.masks import Aligner, cut_accepted
from carproto.data.metadata import read_metadata
from carproto.data.segmenter import load_segmenter
from carproto.data.store import PictureStore
from carproto.files import atomic_path, load_json, save_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import sample_factors

PACKS = ("common_cars_train", "common_cars_heldout", "concept_cars_train", "concept_cars_heldout")
LIMITS = (AlignConfig.max_defect_score, 0.48)  # of the defect score; concept cars are few, so theirs is wider
PARTS = ("packs", "limits", "mirror_toys", "mirror_photos", "masks_of_toys", "timing", "engines", "inspection")
SEED = 2024  # of the backgrounds
LOOK_SEED = 3517  # of the photos that are looked at; a new one for each look
KINDS = ("common", "concept")  # of cars; a pack's name begins with one


def open_aligners(
    data: Path, masks: Path | None, network: str, config: AlignConfig, limits: dict[str, float]
) -> dict[str, tuple[PictureStore, Aligner]]:
    """Open each pack with the aligner that finds its masks, and the limit of the defect score for its kind of cars."""
    packs = {}
    for name in PACKS:
        limited = replace(config, max_defect_score=limits[name.split("_")[0]])
        aligner = Aligner(limited, segment=network, masks=masks and masks / name)
        packs[name] = PictureStore(data / f"{name}.zip"), aligner
    return packs


def count_pack(store: PictureStore, aligner: Aligner) -> tuple[dict, list[str]]:
    """Align all photos of a pack; return counts by source and reason, and the names of those accepted."""
    counts = defaultdict(Counter)
    reasons = defaultdict(Counter)
    accepted = []
    rows = read_metadata(store)
    aligner.prepare(store, store.names)
    for name in tqdm(store.names, desc=Path(store.path).stem):
        source = Path(name).name.split("_")[0]
        try:
            data = store.read(name)
            aligner(open_picture(data), 64, store=store, name=name, data=data, row=rows.get(name, {}))
            counts[source]["accepted"] += 1
            accepted.append(name)
        except CarprotoError as error:
            counts[source]["rejected"] += 1
            reasons[source][str(error).split(" (")[0]] += 1
    result = {
        "n": len(store.names),
        "accepted": len(accepted),
        "by_source": {key: dict(value) for key, value in counts.items()},
        "reasons": dict(sum(reasons.values(), Counter()).most_common()),
        "reasons_by_source": {key: dict(value.most_common()) for key, value in reasons.items()},
    }
    return result, accepted


def score_pack(store: PictureStore, aligner: Aligner) -> dict[str, float]:
    """Return the defect score of each photo that keeps all other limits, by name."""
    scores = {}
    rows = read_metadata(store)
    limits_only = replace(aligner.config, classifier=None)
    classifier = load_mask_classifier(aligner.config.classifier)
    for name in tqdm(store.names, desc=Path(store.path).stem):
        data = store.read(name)
        view = rows[name].get("view") or rows[name].get("view_guess")
        photo, mask = open_picture(data), aligner.find_mask(store, name, data)
        try:
            car, _ = cut_accepted(photo, mask, limits_only, view=view)
            inputs = classifier_inputs(car, view in ("right", "front-right"))
        except CarprotoError:
            continue
        scores[name] = score_mask(classifier, inputs)
    return scores


def measure_limits(
    scores: dict[str, dict[str, float]], tighter: dict[str, float], packs: dict, n: int, look: Path | None
) -> dict:
    """Count what limits of the defect score accept, and write sheets of what the tighter ones accept."""
    limits = (0.08, 0.1, 0.12, 0.14, 0.15, 0.16, 0.18, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    counts = {
        pack: {limit: sum(score <= limit for score in row.values()) for limit in limits} for pack, row in scores.items()
    }
    accepted = {
        pack: [name for name, score in row.items() if score <= tighter[pack.split("_")[0]]]
        for pack, row in scores.items()
    }
    sheets = show_accepted(accepted, packs, n, look and look / "tighter")
    return {
        "accepted_at_limit": counts,
        "tighter": tighter,
        "accepted": {pack: len(names) for pack, names in accepted.items()},
        "sheets": sheets,
    }


def sample_accepted(accepted: dict[str, list[str]], n: int, seen: set[str]) -> list[tuple[str, str]]:
    """Choose n accepted photos of all packs in proportion, without those common cars that have a label.

    Concept cars stay in, labelled or not: every one has a label, so that without them none would be looked at.
    """
    total = sum(map(len, accepted.values()))
    shares = {pack: round(n * len(accepted[pack]) / total) for pack in PACKS}
    shares[PACKS[0]] += n - sum(shares.values())  # what rounding leaves
    rng, chosen = np.random.default_rng(LOOK_SEED), []
    for pack in PACKS:
        names = sorted(accepted[pack])
        fresh = [name for name in names if pack.startswith("concept") or f"{pack}/{Path(name).name}" not in seen]
        chosen += [(pack, fresh[i]) for i in sorted(rng.permutation(len(fresh))[: shares[pack]])]
    return chosen


def show_accepted(accepted: dict[str, list[str]], packs: dict, n: int, folder: Path | None) -> dict:
    """Write sheets of n accepted cars into a folder, unless it is None, and say how they were chosen."""
    chosen = sample_accepted(accepted, n, set(load_json(Path("data/mask_classifier/labels.json"))))
    if folder:
        save_sheets(chosen, packs, folder)
    sample = Counter((pack, Path(name).name.split("_")[0]) for pack, name in chosen)
    counts = {" ".join(key): n for key, n in sorted(sample.items())}
    return {"seed": LOOK_SEED, "n": len(chosen), "sample": counts}


def save_sheets(chosen: list[tuple[str, str]], packs: dict, folder: Path, side: int = 184, n_columns: int = 5) -> None:
    """Write sheets of 25: each car as the photo with its mask's edge, and aligned; numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {pack: read_metadata(store) for pack, (store, _) in packs.items()}
    for start in range(0, len(chosen), n_columns**2):
        sheet = Image.new("RGB", (2 * side * n_columns, side * n_columns), "white")
        draw = ImageDraw.Draw(sheet)
        for i, (pack, name) in enumerate(chosen[start : start + n_columns**2]):
            store, aligner = packs[pack]
            data = store.read(name)
            photo = open_picture(data)
            car = aligner(photo, side, store=store, name=name, data=data, row=rows[pack].get(name, {}))
            x, y = 2 * side * (i % n_columns), side * (i // n_columns)
            height = round(side / (aligner.config.aspect or 1))
            sheet.paste(photo.resize((side, height)), (x, y + side - height))
            sheet.paste(car, (x + side, y))
            draw.text((x + 3, y + 3), str(start + i), fill="red")
        sheet.save(folder / f"accepted_{start:03d}.png")


def measure_mirror(n: int) -> dict:
    """Align toy cars of known view, seen from both sides, and count those unlike the car that was never mirrored."""
    wrong, config = 0, AlignConfig()
    for i in range(n):
        factors = sample_factors(11, i, view=("front-right", "front-left")[i % 2])
        left = replace(factors, view="front-left", light=-factors.light) if i % 2 == 0 else factors
        cars = []
        for one in (factors, left):
            picture, mask = render_car(one, 128)
            outline = Image.fromarray(mask.astype(np.uint8) * 255)
            car = align_car(Image.fromarray(picture), outline, config, 64, mirrored=one.view == "front-right")
            cars.append(np.asarray(car, np.float32))
        wrong += np.abs(cars[0] - cars[1]).mean() > np.abs(cars[0][:, ::-1] - cars[1]).mean()
    return {"n": n, "wrong": int(wrong)}


def measure_photos(file: Path) -> dict:
    """Count the photos whose nose the cross-validated view classifier would turn to the wrong side."""
    result = load_json(file)["with_unlabelled"]
    confusion = np.array(result["confusion"])
    sides = {"left": (0, 1), "right": (3, 4)}  # views of either side, as `VIEWS` counts them
    right = int(sum(confusion[np.ix_(views, views)].sum() for views in sides.values()))
    wrong = int(
        confusion[np.ix_(sides["left"], sides["right"])].sum() + confusion[np.ix_(sides["right"], sides["left"])].sum()
    )
    return {"record": file.name, "n": right + wrong, "wrong": wrong, "share_right": round(right / (right + wrong), 4)}


def crop_background(photo: Image.Image, mask: Image.Image) -> Image.Image | None:
    """Make a background of 128 pixels from the strips above and below a car; None where they are too thin."""
    rows = np.flatnonzero((np.asarray(mask.resize(photo.size)) > 64).any(1))
    if not len(rows) or rows[0] < 0.2 * photo.height or photo.height - rows[-1] < 0.06 * photo.height:
        return None
    result = Image.new("RGB", (128, 128))
    result.paste(photo.crop((0, 0, photo.width, rows[0] - 2)).resize((128, 88)), (0, 0))
    result.paste(photo.crop((0, rows[-1] + 2, photo.width, photo.height)).resize((128, 40)), (0, 88))
    return result


def sample_backgrounds(n: int, packs: dict) -> list[Image.Image]:
    """Return n pictures of 128 pixels: the first half noise, the second the surroundings of cars in street photos."""
    rng = np.random.default_rng(SEED)
    pictures = [Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)) for _ in range(n - n // 2)]
    pictures = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in pictures]
    store, aligner = packs["common_cars_train"]
    streets = [
        name for name in store.names if Path(name).name.startswith("photo_")
    ]  # the others stand before studio walls
    for i in rng.permutation(len(streets)):
        data = store.read(streets[i])
        mask = aligner.find_mask(store, streets[i], data)
        background = crop_background(open_picture(data), mask) if mask else None
        pictures += [background] if background else []
        if len(pictures) == n:
            break
    return pictures


def segment_toy(segment: Callable, picture: Image.Image, file: Path | None) -> Image.Image:
    """Return the network's mask of a toy car, from a file when it was computed before."""
    if file and file.is_file():
        return Image.open(file)
    mask = segment(picture)
    if file:
        with atomic_path(file) as temporary:
            mask.save(temporary, "PNG")
    return mask


def measure_toys(
    network: str, n: int, packs: dict, masks: Path | None, look: Path | None, engine: str = AlignConfig.mask_engine
) -> dict:
    """Compare the network's masks of toy cars, before noise and before photos by turns, with their true ones."""
    segment = load_segmenter(path=network, threads=1, engine=engine)
    overlaps = {"noise": [], "photo": []}
    examples = []
    backgrounds = sample_backgrounds(n, packs)
    for i in tqdm(range(n), desc="toys"):
        kind = ("noise", "photo")[i % 2]
        picture, mask = render_car(sample_factors(9, i), 128)
        outline = Image.fromarray(mask.astype(np.uint8) * 255)
        busy = Image.composite(Image.fromarray(picture), backgrounds[i // 2 + (i % 2) * (n - n // 2)], outline)
        predicted = segment_toy(segment, busy, masks and masks / "toys" / f"{i:03d}.png")
        is_car = np.asarray(predicted) > 127
        overlaps[kind].append(float((is_car & mask).sum() / (is_car | mask).sum()))
        examples.append((overlaps[kind][-1], busy, predicted))
    if look:
        save_toys(examples, look)
    overlaps["all"] = overlaps["noise"] + overlaps["photo"]
    return {kind: {"n": len(values), **describe_quantiles(values)} for kind, values in overlaps.items()}


def describe_quantiles(values: list[float]) -> dict[str, float]:
    """Return quantiles by name."""
    return {f"quantile_{q}": round(float(np.quantile(values, q)), 4) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def save_toys(examples: list, folder: Path) -> None:
    """Write a sheet of toy cars and their masks: the first ten, the last ten, then the ten with the least overlap."""
    folder.mkdir(parents=True, exist_ok=True)
    worst = sorted(range(len(examples)), key=lambda i: examples[i][0])[:10]
    sheet = Image.new("RGB", (1280, 768))
    for row, chosen in enumerate((range(10), range(len(examples) - 10, len(examples)), worst)):
        for column, i in enumerate(chosen):
            sheet.paste(examples[i][1], (128 * column, 256 * row))
            sheet.paste(examples[i][2].convert("RGB"), (128 * column, 256 * row + 128))
    sheet.save(folder / "toys.png")


def time_call(call: Callable, *inputs) -> tuple[tuple[float, float], object]:
    """Return a call's seconds on the wall and of CPU time, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*inputs)
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def describe_times(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Sum up seconds on the wall and of CPU time, in milliseconds."""
    wall, cpu = 1000 * np.array(pairs).T
    return {
        "n": len(pairs),
        "cpu_ms_mean": round(float(cpu.mean()), 2),
        "cpu_ms_median": round(float(np.median(cpu)), 2),
        "wall_ms_median": round(float(np.median(wall)), 2),
        "wall_ms_least": round(float(wall.min()), 2),
    }


def load_engines(network: str) -> dict[str, Callable]:
    """Load the network with each engine, on one thread."""
    return {engine: load_segmenter(path=network, threads=1, engine=engine) for engine in get_args(MaskEngine)}


def measure_time(network: str, packs: dict, n: int) -> dict:
    """Time both engines, by turns, and then everything else on n photos, on one thread; data sets are aligned so too.

    A machine is quiet when its load says so; on a busy one CPU time counts."""
    engines = load_engines(network)
    store, aligner = packs["common_cars_train"]
    rows = read_metadata(store)
    times = defaultdict(list)
    load = os.getloadavg()[0]

    def align(picture: Image.Image, name: str, data: bytes) -> str:
        try:
            aligner(picture, 128, store=store, name=name, data=data, row=rows[name])
        except CarprotoError:
            return "align_rejected"
        return "align_accepted"

    def read(name: str) -> tuple[bytes, Image.Image]:
        data = store.read(name)
        return data, open_picture(data)

    names = store.names[: n + 1]  # of each pass, the first call takes longer and is left out
    for i, name in enumerate(names):
        _, picture = read(name)
        for engine in list(engines)[:: 1 if i % 2 else -1]:
            times[engine].append(time_call(engines[engine], picture)[0])
    for name in names:
        seconds, (data, picture) = time_call(read, name)
        times["read_and_decode"].append(seconds)
        seconds, kind = time_call(align, picture, name, data)
        times["align"].append(seconds)
        times[kind].append(seconds)
    times = {kind: pairs if kind.startswith("align_") else pairs[1:] for kind, pairs in times.items()}
    described = {kind: describe_times(pairs) for kind, pairs in times.items()}
    cpu = {engine: np.array(times[engine])[:, 1] for engine in engines}
    result = {"n": n, "size": 128, "load_average": [round(load, 1), round(os.getloadavg()[0], 1)]}
    return {
        **result,
        "n_cores": os.cpu_count(),
        "network": {
            engine: {"precision": segment.precision, **described.pop(engine)} for engine, segment in engines.items()
        },
        "openvino_share_of_cpu": round(float(np.median(cpu["openvino"] / cpu["onnxruntime"])), 3),
        **described,
    }


def is_accepted(picture: Image.Image, mask: Image.Image, aligner: Aligner, view: str | None) -> bool:
    """Return whether a photo is accepted with a mask."""
    try:
        cut_accepted(picture, mask, aligner.config, view=view)
    except CarprotoError:
        return False
    return True


def compare_engines(network: str, packs: dict, n: int) -> dict:
    """Compare the engines' masks of n photos of each training pack and of n toy cars.

    The photos are taken at even distances; what is accepted is counted, too."""
    engines = load_engines(network)
    results = {}
    for pack in ("common_cars_train", "concept_cars_train"):
        store, aligner = packs[pack]
        rows = read_metadata(store)
        overlaps, decisions = defaultdict(list), Counter()
        for name in tqdm(store.names[:: len(store.names) // n][:n], desc=pack):
            picture = open_picture(store.read(name))
            masks = [segment(picture) for segment in engines.values()]
            inside = [np.asarray(mask) > 127 for mask in masks]
            union = int((inside[0] | inside[1]).sum())
            view = rows[name].get("view") or rows[name].get("view_guess")
            decision = tuple(is_accepted(picture, mask, aligner, view) for mask in masks)
            decisions[decision] += 1
            for kind in ["all"] + ["accepted_by_both"] * all(decision):
                overlaps[kind].append(float((inside[0] & inside[1]).sum() / union) if union else 1.0)
        results[pack] = {
            "n": len(overlaps["all"]),
            "iou": {
                kind: {"least": round(min(values), 4), **describe_quantiles(values)}
                for kind, values in overlaps.items()
            },
            "accepted_by_both": decisions[True, True],
            "rejected_by_both": decisions[False, False],
            "accepted_by_onnxruntime_only": decisions[True, False],
            "accepted_by_openvino_only": decisions[False, True],
        }
    toys = {engine: measure_toys(network, n, packs, None, None, engine)["all"] for engine in engines}
    return {"agreement": results, "iou_of_toys": toys}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="entries of the record to make")
    parser.add_argument("--data", type=Path, help=f"folder with {', '.join(PACKS)} as zip")
    parser.add_argument("--network", help="file of u2netp")
    parser.add_argument("--masks", type=Path, help="folder that holds a folder of masks for each pack")
    parser.add_argument(
        "--aspect", type=float, help="width by height of the photos when they were taken, where they were squashed"
    )
    parser.add_argument("--n_toys", type=int, default=500)
    parser.add_argument("--n_timed", type=int, default=100)
    parser.add_argument("--n_compared", type=int, default=100, help="photos of each training pack that engines segment")
    parser.add_argument("--n_looked", type=int, default=200, help="accepted cars on the sheets")
    parser.add_argument(
        "--limits", nargs=2, type=float, default=LIMITS, help="of the defect score, for common and concept cars"
    )
    parser.add_argument(
        "--tighter", nargs=2, type=float, default=(0.13, 0.15), help="other limits that part `limits` compares"
    )
    parser.add_argument("--look", type=Path, help="folder for sheets of accepted cars and of toy cars")
    parser.add_argument(
        "--bad", nargs="*", default=[], help="numbers on the sheets that are bad, with the reason, such as 17:halo"
    )
    parser.add_argument("--note", default="", help="a sentence for the record of the inspection")
    parser.add_argument("--out", type=Path, default=Path("data/records/align.json"))
    return parser.parse_args()


def measure_packs(
    packs: dict, aspect: float | None, limits: dict[str, float], n_looked: int, look: Path | None
) -> dict:
    """Count all packs and write the sheets of accepted cars."""
    results, accepted = {}, {}
    for name, (store, aligner) in packs.items():
        results[name], accepted[name] = count_pack(store, aligner)
    sheets = show_accepted(accepted, packs, n_looked, look)
    return {
        "aspect": aspect,
        "max_defect_score": limits,
        **results,
        "sheets": sheets,
    }


def describe_inspection(bad: list[str], packs: dict, note: str) -> dict:
    """Count what somebody rejected on the sheets, by reason."""
    reasons = Counter(entry.partition(":")[2] for entry in bad)
    result = {**packs["sheets"], "max_defect_score": packs["max_defect_score"], "n_bad": len(bad)}
    return {**result, "reasons": dict(reasons), "bad": bad, "note": note}


def main() -> None:
    """Measure, print and write the record."""
    arguments = parse_arguments()
    config = AlignConfig(aspect=arguments.aspect)
    limits = dict(zip(KINDS, arguments.limits))
    packs = open_aligners(arguments.data, arguments.masks, arguments.network, config, limits) if arguments.data else {}
    record = load_json(arguments.out) if arguments.out.is_file() else {}
    measures = {
        "packs": lambda: measure_packs(packs, config.aspect, limits, arguments.n_looked, arguments.look),
        "limits": lambda: measure_limits(
            {name: score_pack(*pack) for name, pack in packs.items()},
            dict(zip(KINDS, arguments.tighter)),
            packs,
            arguments.n_looked,
            arguments.look,
        ),
        "mirror_toys": lambda: measure_mirror(200),
        "mirror_photos": lambda: measure_photos(Path("data/records/views.json")),
        "masks_of_toys": lambda: measure_toys(
            arguments.network, arguments.n_toys, packs, arguments.masks, arguments.look
        ),
        "timing": lambda: measure_time(arguments.network, packs, arguments.n_timed),
        "engines": lambda: compare_engines(arguments.network, packs, arguments.n_compared),
        "inspection": lambda: describe_inspection(arguments.bad, record["packs"], arguments.note),
    }
    for part in arguments.parts:
        machine = describe_environment()
        start = time.monotonic()
        result = measures[part]()
        about = {"command": describe_command(), "seconds": round(time.monotonic() - start, 1), "machine": machine}
        record = load_json(arguments.out) if arguments.out.is_file() else {}
        record[part] = {**result, **about}
        save_json(record, arguments.out)
        print(part, record[part])


if __name__ == "__main__":
    main()
