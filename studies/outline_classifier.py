"""Fit the classifier that scores the outline of a segmented car, from masks labelled by hand and from toy cars.

    python studies/outline_classifier.py --data /photos --masks /masks --out /tmp/outline_classifier

It reads the labels of data/outline_classifier/labels.json (true for a defect) and needs the masks that u2netp made of the packs' photos.
`--masks` holds a folder of a pack's name for each pack, as studies/alignment.py takes them; they are not part of the repository. A whole
toy car counts as good, a toy car with a part cut off or added as a defect. It prints the area under the ROC curve and the shares
accepted and wrong at some limits, all cross-validated, and writes weights and config.json.
"""

import argparse
from pathlib import Path

import numpy as np
from freezed import describe_command
from PIL import Image, ImageFilter
from safetensors.numpy import save_file
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import _expand, _outline, _outline_features, _shrink, measure_mask
from carproto.data.masks import mask_name
from carproto.data.metadata import read_metadata
from carproto.data.store import PictureStore
from carproto.files import load_json, save_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import COMMON, FUTURISTIC, sample_factors

NUMBERS = ("area", "blur", "inside", "around", "others", "cut", "fill", "shape", "thin", "valley")
OFFSETS = (0.05, 0.01, 0.003, 0.002, 0.002, 0.03, 0.1, 0.1, 0.003, 0.005)
N_COMPONENTS = 20
N_FOLDS = 8


def describe_mask(mask: Image.Image, stretch: float, mirrored: bool) -> np.ndarray:
    """Return the inputs of the classifier: 480 values of the outline, and the logarithms of ten numbers."""
    numbers = measure_mask(mask, stretch)
    outline = _outline(_shrink(mask), stretch)
    logarithms = np.log(np.array([numbers[name] for name in NUMBERS]) + OFFSETS)
    return np.concatenate([_outline_features(outline[:, ::-1] if mirrored else outline), logarithms])


def describe_photos(
    labels: dict[str, bool], data: Path, masks: Path, aspect: float
) -> tuple[list[np.ndarray], list[bool]]:
    """Describe the masks of all labelled photos."""
    inputs, is_bad = [], []
    for pack in sorted({name.split("/")[0] for name in labels}):
        store = PictureStore(data / f"{pack}.zip")
        rows = read_metadata(store)
        names = [name for name in store.names if f"{pack}/{Path(name).name}" in labels]
        for name in tqdm(names, desc=pack):
            photo = store.read(name)
            file = masks / pack / mask_name(photo)
            if not file.is_file():
                raise CarprotoError(f"{file} is missing: compute the masks of {pack} first, with studies/alignment.py")
            view = rows[name].get("view") or rows[name].get("view_guess") or ""
            width, height = open_picture(photo).size
            mirrored = view in ("right", "front-right")
            inputs.append(describe_mask(open_picture(file).convert("L"), aspect * height / width, mirrored))
            is_bad.append(labels[f"{pack}/{Path(name).name}"])
    return inputs, is_bad


def render_mask(seed: int, i: int) -> tuple[Image.Image, bool]:
    """Render the mask of a toy car; say whether its nose points right."""
    view = ("left", "front-left", "front-right")[i % 3]
    _, mask = render_car(sample_factors(seed, i, COMMON if i % 2 else FUTURISTIC, view=view), 128)
    return Image.fromarray(mask.astype(np.uint8) * 255), view == "front-right"


def spoil(mask: Image.Image, i: int) -> Image.Image:
    """Add a block on the roof, or cut off the front, the rear or a wheel, by turns."""
    left, top, right, bottom = mask.getbbox()
    width, height = right - left, bottom - top
    rng = np.random.default_rng(i)
    part = rng.uniform(0.2, 0.5) * width
    x = rng.uniform(left, right - part)
    kind = i // 3 % 4
    if kind == 0:
        box, value = (x, max(0, top - rng.uniform(0.2, 0.6) * height), x + part, top + 0.4 * height), 255
    elif kind == 1:
        box, value = (left, 0, left + rng.uniform(0.35, 0.6) * width, top + rng.uniform(0.5, 0.7) * height), 0
    elif kind == 2:
        box, value = (left + rng.uniform(0.4, 0.65) * width, 0, right, top + rng.uniform(0.5, 0.7) * height), 0
    else:
        box, value = (x, top + rng.uniform(0.4, 0.6) * height, x + part, bottom + 1), 0
    mask.paste(value, [int(side) for side in box])
    return mask


def describe_toys(n: int, n_spoiled: int) -> tuple[list[np.ndarray], list[bool]]:
    """Describe masks of whole and of spoiled toy cars, blurred as a network's masks are."""
    inputs = []
    for i in range(n + n_spoiled):
        is_whole = i < n
        mask, mirrored = render_mask(77 if is_whole else 78, i if is_whole else i - n)
        mask = mask if is_whole else spoil(mask, i - n)
        radius = (0, 0.8, 1.2, 1.6)[(i if is_whole else i - n) % 4]
        inputs.append(describe_mask(mask.filter(ImageFilter.GaussianBlur(radius)), 1.0, mirrored))
    return inputs, [i >= n for i in range(n + n_spoiled)]


def expand(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Compute the features of the regression for inputs (N, 490)."""
    outlines, numbers = x[:, :480] - state["mu"], x[:, 480:]
    components = outlines @ state["v"].T
    residual = np.sqrt(((outlines - components @ state["v"]) ** 2).sum(1, keepdims=True))
    return _expand(
        components / state["sd"], (residual - state["rm"]) / state["rs"], (numbers - state["nm"]) / state["ns"]
    )


def fit(x: np.ndarray, is_bad: np.ndarray, ridge: float) -> dict[str, np.ndarray]:
    """Fit principal components and ridge regression; return the tensors that `OutlineClassifier` takes."""
    mean = x[:, :480].mean(0)
    _, _, directions = np.linalg.svd(x[:, :480] - mean, full_matrices=False)
    state = {"mu": mean, "v": directions[:N_COMPONENTS]}
    components = (x[:, :480] - mean) @ state["v"].T
    residual = np.sqrt(((x[:, :480] - mean - components @ state["v"]) ** 2).sum(1))
    state |= {"sd": components.std(0)[:1] / 1.5, "rm": residual.mean(keepdims=True), "rs": residual.std(keepdims=True)}
    state |= {"nm": x[:, 480:].mean(0), "ns": x[:, 480:].std(0)}
    features = expand(state, x)
    state["qm"] = features.mean(0)
    features = features - state["qm"]
    state["b"] = is_bad.mean(keepdims=True)
    dual = np.linalg.solve(features @ features.T + ridge * np.eye(len(x)), is_bad - state["b"])
    return state | {"w": features.T @ dual}


def score(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return defect scores (N)."""
    return (expand(state, x) - state["qm"]) @ state["w"] + state["b"]


def measure_auc(scores: np.ndarray, is_bad: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    rank = scores.argsort().argsort() + 1
    n_bad = int(is_bad.sum())
    return float((rank[is_bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * (len(is_bad) - n_bad)))


def cross_validate(x: np.ndarray, is_bad: np.ndarray, ridge: float) -> np.ndarray:
    """Score each mask by a classifier that was fitted without its fold."""
    fold = np.random.default_rng(0).integers(0, N_FOLDS, len(x))
    scores = np.zeros(len(x))
    for k in range(N_FOLDS):
        scores[fold == k] = score(fit(x[fold != k], is_bad[fold != k], ridge), x[fold == k])
    return scores


def main() -> None:
    """Describe, cross-validate, fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the packs as zip")
    parser.add_argument("--masks", type=Path, required=True, help="folder that holds a folder of masks for each pack")
    parser.add_argument("--labels", type=Path, default=Path("data/outline_classifier/labels.json"))
    parser.add_argument("--aspect", type=float, default=1.4, help="width by height of the photos when they were taken")
    parser.add_argument("--ridge", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors and config.json")
    arguments = parser.parse_args()
    photos, labels = describe_photos(load_json(arguments.labels), arguments.data, arguments.masks, arguments.aspect)
    toys, toy_labels = describe_toys(240, 160)
    x, is_bad = np.array(photos + toys), np.array(labels + toy_labels)
    held_out, truth = cross_validate(x, is_bad, arguments.ridge)[: len(photos)], is_bad[: len(photos)]
    report = {
        "n_photos": len(photos),
        "n_toys": 240,
        "n_spoiled_toys": 160,
        "n_bad": int(is_bad.sum()),
        "n_folds": N_FOLDS,
    }
    report["auc"] = round(measure_auc(held_out, truth), 4)
    for limit in (0.15, 0.18, 0.21, 0.24):
        accepted = held_out <= limit
        report[f"at_{limit}"] = {
            "accepted": round(float(accepted.mean()), 4),
            "bad_among_accepted": round(float(truth[accepted].mean()), 4),
        }
    state = fit(x, is_bad, arguments.ridge)
    arguments.out.mkdir(parents=True, exist_ok=True)
    types = {name: np.float16 if name in ("mu", "v") else np.float32 for name in state}
    save_file(
        {name: np.ascontiguousarray(value, types[name]) for name, value in state.items()},
        arguments.out / "model.safetensors",
    )
    config = {"kind": "outline classifier", "format": 1, "numbers": NUMBERS, "offsets": OFFSETS, "report": report}
    save_json(config, arguments.out / "config.json")
    print(describe_command(), describe_environment()["commit"], report)


if __name__ == "__main__":
    main()
