"""Train the classifier that scores a segmented car, on spoiled masks of photos, then on labels given on contact sheets.

    python studies/mask_classifier.py --data /photos --masks /masks --before /before --out /tmp/mask_classifier
    python studies/mask_classifier.py --data /photos --masks /masks --before /before --out /tmp/mask_classifier
        --start mask_classifier

It reads data/mask_classifier/labels.json: 1 for a defect, 0.5 for an unsure one, 0 for a good cut-out, 0.12 for a good
one of an earlier method. It needs the corrected masks of the packs' photos, as `load_segmenter` makes them: `--masks`
holds a folder of a pack's name for each pack, as studies/alignment.py takes them, and `--before` the masks of an
earlier corrector. Photos and masks are not part of the repository.

The network starts from the encoder of the mask corrector. First it separates photos from copies of them whose mask
lacks a part, or has one too many, photos from those into which a second car was pasted, toy cars from spoiled ones, and
the cut-outs of today from those of the earlier corrector, where the two differ; `--start` skips this step and takes
weights that were fitted before. Then it is fitted to the labels, mixed with these pairs. The area under the ROC curve
is measured on every fourth label of current cut-outs, before these are fitted too: for one more epoch, or with
`--start` from those weights anew.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _record import describe_command, mask_parser
from PIL import Image, ImageFilter
from scipy import ndimage
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import CUT_SIDE, AlignConfig, cut_car
from carproto.data.mask_classifier import (
    MaskClassifier,
    classifier_tensor,
    frame_layers,
    hide_surroundings,
    load_mask_classifier,
)
from carproto.data.mask_limits import check_limits
from carproto.data.masks import mask_name
from carproto.data.matte import bounding_box, main_part
from carproto.data.metadata import read_metadata
from carproto.data.segmenter import load_mask_corrector
from carproto.data.store import PictureStore
from carproto.files import load_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import COMMON, FUTURISTIC, sample_factors
from carproto.weights import save_weights

PACKS = ("common_cars_train", "concept_cars_train", "common_cars_heldout", "concept_cars_heldout")
TARGETS = {"clean": 0.05, "spoiled": 0.97}  # of the first step: some photos' own masks have a defect
N_TRIES = 8
DROPOUT = 0.3


def describe_photos(data: Path, masks: Path, aspect: float, wanted: set[str] | None, n: int) -> dict[str, np.ndarray]:
    """Return the layers of n photos by `pack/file name`: those wanted, or those whose mask keeps the limits."""
    config, layers = AlignConfig(aspect=aspect), {}
    for pack in PACKS if wanted else PACKS[:2]:
        store = PictureStore(data / f"{pack}.zip")
        rows = read_metadata(store)
        chosen = [name for name in store.names if wanted is None or f"{pack}/{Path(name).name}" in wanted]
        if wanted is None and len(chosen) > n:
            chosen = [chosen[i] for i in sorted(np.random.default_rng(1).permutation(len(chosen))[:n])]
        for name in tqdm(chosen, desc=pack):
            content = store.read(name)
            file = masks / pack / mask_name(content)
            if not file.is_file():
                raise CarprotoError(f"{file} is missing: compute the masks of {pack} first, with studies/alignment.py")
            photo, mask = open_picture(content), open_picture(file).convert("L")
            view = rows[name].get("view") or rows[name].get("view_guess")
            if wanted is None and (
                view not in config.views or check_limits(mask, config, stretch=aspect * photo.height / photo.width)
            ):
                continue
            mirrored = view in ("right", "front-right")
            layers[f"{pack}/{Path(name).name}"] = frame_layers(cut_car(photo, mask, config, CUT_SIDE), mirrored)
    return layers


def describe_changed(data: Path, masks: Path, before: Path, aspect: float, n: int, left_out: set) -> tuple:
    """Return the inputs of n pairs: cut-outs of today, and by an earlier mask that lacks a part or has one too many."""
    config, pairs = AlignConfig(aspect=aspect), []
    for pack, share in ((PACKS[1], 0.15), (PACKS[0], 1)):
        store, rows = PictureStore(data / f"{pack}.zip"), read_metadata(PictureStore(data / f"{pack}.zip"))
        for i in tqdm(np.random.default_rng(2).permutation(len(store.names)), desc=f"{pack}, changed"):
            if len(pairs) >= share * n:
                break
            content, name = store.read(store.names[i]), store.names[i]
            view = rows[name].get("view") or rows[name].get("view_guess")
            files = [root / pack / mask_name(content) for root in (masks, before)]
            now, then = (open_picture(file).convert("L") for file in files)
            if view not in config.views or f"{pack}/{Path(name).name}" in left_out:
                continue
            is_car = np.asarray(now) > 127
            other = ndimage.binary_opening(is_car ^ (np.asarray(then) > 127), np.ones((3, 3)))
            if not other.any() or not 0.02 < main_part(other)[1][0] / is_car.sum() < 0.3:
                continue
            photo, mirrored = open_picture(content), view in ("right", "front-right")
            stretch = aspect * photo.height / photo.width
            if any(check_limits(mask, config, stretch=stretch) for mask in (now, then)):
                continue
            cars = [cut_car(photo, mask, config, CUT_SIDE) for mask in (now, then)]
            pairs.append([hide_surroundings(frame_layers(car, mirrored)) for car in cars])
    return np.stack([one for one, _ in pairs]), np.stack([other for _, other in pairs])


def sample_blob(rng: np.random.Generator, shape: tuple[int, int], box: tuple) -> np.ndarray:
    """Return an ellipse, one side of a line, or a rectangle, at random within a box."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    left, top, right, bottom = box
    kind = rng.integers(3)
    if kind == 0:
        centre, radii = (rng.uniform(left, right), rng.uniform(top, bottom)), (rng.uniform(5, 22), rng.uniform(4, 14))
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1
    if kind == 1:
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.55, 0.95)
        across = (x - (left + right) / 2) * np.cos(angle) / (0.5 * (right - left))
        return across + (y - (top + bottom) / 2) * np.sin(angle) / (0.5 * (bottom - top)) > distance
    x0, y0 = rng.uniform(left, right - 8), rng.uniform(top, bottom - 6)
    return (x >= x0) & (x < x0 + rng.uniform(6, 28)) & (y >= y0) & (y < y0 + rng.uniform(5, 16))


def change_mask(is_car: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Remove a part at the outline, or add a blob, a rim on one side, or a shadow below the wheels."""
    left, top, right, bottom = box = bounding_box(is_car)
    kind = rng.integers(5)
    if kind <= 1:
        blob = sample_blob(rng, is_car.shape, box)
        return is_car & ~blob if (blob & is_car & ndimage.binary_dilation(~is_car, iterations=3)).any() else is_car
    if kind == 2:
        blob = sample_blob(rng, is_car.shape, (left - 4, top - 8, right + 4, bottom + 4))
        return is_car | (blob & ndimage.binary_dilation(is_car, iterations=int(rng.integers(4, 14))))
    y, x = np.mgrid[: is_car.shape[0], : is_car.shape[1]]
    if kind == 3:
        angle = rng.uniform(0, 2 * np.pi)
        side = (x - 48) * np.cos(angle) + (y - 45) * np.sin(angle) > rng.uniform(-25, 10)
        return is_car | (ndimage.binary_dilation(is_car, iterations=int(rng.integers(2, 5))) & side)
    n, start = int(rng.integers(3, 8)), rng.uniform(0, 60)
    lower = np.zeros_like(is_car)
    lower[n:] = is_car[:-n]
    return is_car | (lower & (x > start) & (x < start + rng.uniform(20, 70)) & (y > bottom - 14))


def spoil(layers: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Spoil mask and opacity of a car's layers and fit the frame again; None when nothing changes enough."""
    is_car = layers[..., 4] > 127
    for _ in range(N_TRIES):
        changed = change_mask(is_car, rng)
        if not changed.any():
            continue
        changed = ndimage.binary_fill_holes(main_part(changed)[0])
        if (changed ^ is_car).sum() < 0.012 * is_car.sum():
            continue
        return set_mask(layers, changed, rng)
    return None


def set_mask(layers: np.ndarray, changed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change mask and opacity of layers where a mask (76, 96) differs, softly, and fit the frame again."""
    result, values = layers.copy(), changed.astype(np.float32)
    near = ndimage.gaussian_filter((changed ^ (layers[..., 4] > 127)).astype(np.float32), 1) > 0.1
    result[..., 4] = np.where(near, 255 * ndimage.gaussian_filter(values, 0.7), layers[..., 4])
    softer, weight = ndimage.gaussian_filter(values, rng.uniform(0.8, 2.5)), rng.uniform(0.5, 1)
    blend = weight * 255 * softer + (1 - weight) * layers[..., 3]
    result[..., 3] = np.where(near, blend, layers[..., 3]).clip(0, 255)
    return fit_frame(result)


def fit_frame(layers: np.ndarray) -> np.ndarray:
    """Resample layers so that the box of the opacity fills the frame again."""
    left, top, right, bottom = bounding_box(main_part(layers[..., 4] > 127)[0])
    scale = min(90.2 / (right - left), 76.8 / (bottom - top))
    if abs(scale - 1) < 0.01 and abs((left + right) / 2 - 48) < 0.7 and abs(bottom - 72.4) < 0.7:
        return layers
    width, height, rim = 96 / scale, 76 / scale, 40
    x, y = (left + right) / 2 - width / 2 + rim, bottom - 72.4 / scale + rim
    padded = np.pad(layers, ((rim, rim), (rim, rim), (0, 0)))
    channels = [Image.fromarray(np.ascontiguousarray(padded[..., c])) for c in range(layers.shape[2])]
    box = (x, y, x + width, y + height)
    return np.dstack([np.asarray(channel.resize((96, 76), Image.Resampling.BILINEAR, box)) for channel in channels])


def render_toys(n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the layers of toy cars before their own background, noise or one colour, with soft masks."""
    layers = []
    for i in range(n):
        view = ("left", "front-left", "front-right")[i % 3]
        rgb, is_car = render_car(sample_factors(77, i, COMMON if i % 2 else FUTURISTIC, view=view), 128)
        mask, picture = Image.fromarray(is_car.astype(np.uint8) * 255), Image.fromarray(rgb)
        noise = Image.fromarray(rng.integers(0, 255, (14, 14, 3), dtype=np.uint8)).resize(
            (128, 128), Image.Resampling.BICUBIC
        )
        plain = Image.new("RGB", (128, 128), tuple(int(value) for value in rng.integers(0, 255, 3)))
        if i % 4 in (1, 2):
            picture = Image.composite(picture, noise if i % 4 == 1 else plain, mask)
        mask = mask.filter(ImageFilter.GaussianBlur((0, 0.8, 1.3, 1.8)[rng.integers(4)]))
        layers.append(frame_layers(cut_car(picture, mask, size=CUT_SIDE), view == "front-right"))
    return layers


def paste_car(layers: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Paste a smaller second car behind a car; return layers whose mask leaves it out, and others that take it in."""
    is_car = layers[..., 4] > 127
    left, top, right, bottom = bounding_box(is_car)
    scale = rng.uniform(0.35, 0.8)
    width, height = int(96 * scale), int(76 * scale)
    other = other[:, ::-1] if rng.random() < 0.5 else other
    channels = [Image.fromarray(np.ascontiguousarray(other[..., c])).resize((width, height)) for c in (0, 1, 2, 4)]
    ground = int(rng.uniform(top + 0.15 * (bottom - top), top + 0.75 * (bottom - top)))
    x, y = int(rng.uniform(-0.6 * width, 96 - 0.4 * width)), ground - int(0.95 * height)
    canvas = [Image.new("L", (96, 76)) for _ in channels]
    for one, channel in zip(canvas, channels):
        one.paste(channel, (x, y))
    *colours, alpha = (np.asarray(one, np.float32) for one in canvas)
    visible = alpha / 255 * (1 - layers[..., 4] / 255)
    clean = layers.copy()
    clean[..., :3] = layers[..., :3] * (1 - visible[..., None]) + np.dstack(colours) * visible[..., None]
    clean[..., 5] = np.maximum(layers[..., 5], 255 * visible)
    taken = visible > 0.5
    if rng.random() < 0.5:
        taken &= ndimage.binary_dilation(is_car, iterations=int(rng.integers(4, 12)))
    changed = ndimage.binary_opening(ndimage.binary_fill_holes(main_part(is_car | taken)[0]), iterations=2)
    return (clean, set_mask(clean, changed, rng)) if (changed & ~is_car).sum() >= 0.012 * is_car.sum() else None


def paste_pairs(layers: list[np.ndarray], n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of n pairs of `paste_car`, or of as many as fifty times that many tries give."""
    pairs = []
    for _ in tqdm(range(50 * n), desc="paste"):
        first, second = rng.integers(0, len(layers), 2)
        pair = paste_car(layers[first], layers[second], rng)
        pairs += [] if pair is None else [tuple(map(hide_surroundings, pair))]
        if len(pairs) == n:
            break
    return np.stack([one for one, _ in pairs]), np.stack([other for _, other in pairs])


def make_pairs(layers: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of photos, and of one spoiled copy of each."""
    pairs = [(one, spoil(one, rng)) for one in tqdm(layers, desc="spoil")]
    pairs = [(hide_surroundings(one), hide_surroundings(other)) for one, other in pairs if other is not None]
    return np.stack([one for one, _ in pairs]), np.stack([other for _, other in pairs])


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change contrast, colour and position at random."""
    n = len(x)
    x = x.clone()
    contrast = 0.8 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator)
    x[:, :3] = (x[:, :3] * contrast + 0.2 * torch.randn(n, 3, 1, 1, generator=generator)).clamp(-1, 1)
    is_grey = torch.rand(n, generator=generator) < 0.15
    x[is_grey, :3] = x[is_grey, :3].mean(1, keepdim=True)
    shift = [int(torch.randint(-2, 3, (1,), generator=generator)) for _ in range(2)]
    return torch.roll(x, shift, (2, 3))


def optimize(net: MaskClassifier, batches: list, lr: float, seed: int) -> None:
    """Fit a network to batches of inputs, targets and weights, each made when it is needed."""
    generator = torch.Generator().manual_seed(seed)
    rates = {net.stages: lr, net.head: 5 * lr}
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=2e-2)
    highest = list(rates.values())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=len(batches), pct_start=0.2)
    net.train()
    for make in tqdm(batches, desc="fit", mininterval=10):
        x, targets, weights = make()
        x = augment(classifier_tensor(x), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()


def shuffle_batches(rng: np.random.Generator, n: int, batch: int, epochs: int) -> list[np.ndarray]:
    """Return the indices of each batch, in another order in each epoch; a rest smaller than a batch is left out."""
    orders = [rng.permutation(n) for _ in range(epochs)]
    return [order[start : start + batch] for order in orders for start in range(0, n - batch + 1, batch)]


def start_network() -> MaskClassifier:
    """Return a classifier with the encoder of the mask corrector, which sees mask and opacity by halves."""
    net, source = MaskClassifier(DROPOUT), load_mask_corrector().stages.state_dict()
    name = "layers.0.0.1.weight"  # of the first convolution, behind its padding
    stem = source[name]
    source[name] = torch.cat([stem[:, :3], stem[:, 3:] / 2, stem[:, 3:] / 2], 1)
    net.stages.load_state_dict({name: source[name] for name in net.stages.state_dict()})
    return net.to(memory_format=torch.channels_last)


def pretrain(clean: np.ndarray, spoiled: np.ndarray, epochs: int, seed: int, batch: int = 20) -> MaskClassifier:
    """Separate cut-outs from their spoiled copies."""
    torch.manual_seed(seed)
    rng, net = np.random.default_rng(seed), start_network()
    targets = torch.tensor([TARGETS["clean"]] * batch + [TARGETS["spoiled"]] * batch)

    def make(chosen: np.ndarray) -> tuple:
        return np.concatenate([clean[chosen], spoiled[chosen]]), targets, torch.ones(2 * batch)

    batches = shuffle_batches(rng, len(clean), batch, epochs)
    optimize(net, [partial(make, chosen) for chosen in batches], 4e-4, seed)
    return net


def fit_labels(
    net: MaskClassifier, x: np.ndarray, y: np.ndarray, pairs: tuple, epochs: int, lr: float, seed: int
) -> MaskClassifier:
    """Fit a pretrained network to labels; a fifth of each batch are clean inputs, and a fifth spoiled ones.

    Labels of defects come three times in an epoch, since they are few.
    """
    few = np.concatenate([y == 1, y == 1])
    x, y = np.concatenate([x, np.concatenate([x, x])[few]]), np.concatenate([y, np.concatenate([y, y])[few]])
    rng, fitted = np.random.default_rng(seed), MaskClassifier(DROPOUT).to(memory_format=torch.channels_last)
    fitted.load_state_dict(net.state_dict())
    clean, spoiled = pairs
    n, n_mixed = 24, 8
    targets = torch.tensor(y, dtype=torch.float32).clamp(0.03, 0.97)
    mixed = torch.tensor([0.04] * n_mixed + [TARGETS["spoiled"]] * n_mixed)
    certain = torch.tensor([0.5 if value == 0.12 else 1.0 for value in y])  # less for labels of earlier cut-outs

    def make(chosen: np.ndarray) -> tuple:
        others = rng.integers(0, len(clean), n_mixed)
        inputs = np.concatenate([x[chosen], clean[others], spoiled[others]])
        weights = torch.cat([certain[chosen], torch.full((2 * n_mixed,), 0.35)])
        return inputs, torch.cat([targets[chosen], mixed]), weights

    batches = shuffle_batches(rng, len(x), n, epochs)
    optimize(fitted, [partial(make, chosen) for chosen in batches], lr, seed)
    return fitted


@torch.inference_mode()
def score_all(net: MaskClassifier, x: np.ndarray) -> np.ndarray:
    """Return the probabilities of a defect (N)."""
    return np.concatenate([torch.sigmoid(net(classifier_tensor(x[i : i + 64]))).numpy() for i in range(0, len(x), 64)])


def measure(scores: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Return the area under the ROC curve, and the share of defects among the best, without unsure labels."""
    scores, is_bad = scores[y != 0.5], y[y != 0.5] > 0.5
    ranks, n_bad = scores.argsort().argsort() + 1, int(is_bad.sum())
    auc = (ranks[is_bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * (len(is_bad) - n_bad))
    order = is_bad[scores.argsort()]
    best = {
        f"bad_among_best_{share}": round(float(order[: int(share * len(order))].mean()), 4) for share in (0.65, 0.75)
    }
    return {"n": len(is_bad), "n_bad": n_bad, "auc": round(float(auc), 4), **best}


def measure_groups(scores: np.ndarray, y: np.ndarray, names: list[str]) -> dict[str, dict]:
    """Measure all labels, and those of common and of concept cars alone."""
    groups = {"all": "", "common": "common_cars", "concept": "concept_cars"}
    chosen = {group: np.array([name.startswith(start) for name in names]) for group, start in groups.items()}
    return {group: measure(scores[rows], y[rows]) for group, rows in chosen.items()}


def main() -> None:
    """Prepare, train, measure and write."""
    parser = mask_parser(__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="masks that an earlier corrector made, like --masks")
    parser.add_argument("--start", help="weights to start from, a folder or a release; none: spoiled masks come first")
    parser.add_argument("--n_photos", type=int, default=2000, help="photos that are spoiled")
    parser.add_argument("--n_pasted", type=int, default=600, help="photos into which a second car is pasted")
    parser.add_argument("--n_changed", type=int, default=1200, help="photos that an earlier corrector cut otherwise")
    parser.add_argument("--n_toys", type=int, default=300, help="toy cars")
    parser.add_argument("--n_earlier", type=int, default=1200, help="labels of earlier cut-outs that are taken")
    parser.add_argument("--epochs", nargs=2, type=int, default=(1, 2), help="of both steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed, (epochs, epochs_labels) = arguments.seed, arguments.epochs
    start, rng = time.monotonic(), np.random.default_rng(seed)
    labels = load_json(arguments.labels)
    earlier = sorted(name for name, label in labels.items() if label == 0.12)
    for i in rng.permutation(len(earlier))[arguments.n_earlier :]:
        del labels[earlier[i]]
    labelled = describe_photos(arguments.data, arguments.masks, arguments.aspect, set(labels), len(labels))
    good = [layers for name, layers in labelled.items() if labels[name] in (0, 0.12)]
    photos = [good[i] for i in rng.permutation(len(good))[: arguments.n_photos]]
    x = np.stack([hide_surroundings(one) for one in labelled.values()])
    y = np.array([labels[name] for name in labelled], float)
    sources = {
        "spoiled": make_pairs(photos, rng),
        "toys": make_pairs(render_toys(arguments.n_toys, rng), rng),
        "pasted": paste_pairs(photos, arguments.n_pasted, rng),
    }
    if arguments.n_changed:
        folders, n_changed = (arguments.data, arguments.masks, arguments.before), arguments.n_changed
        sources["changed"] = describe_changed(*folders, arguments.aspect, n_changed, set(labels))
    pairs = tuple(np.concatenate(several) for several in zip(*sources.values()))
    net = load_mask_classifier(arguments.start) if arguments.start else pretrain(*pairs, epochs, seed)
    is_held = np.zeros(len(x), bool)
    is_held[np.flatnonzero(y != 0.12)[::4]] = True  # 0.12 is a label of an earlier cut-out
    part = fit_labels(net, x[~is_held], y[~is_held], pairs, epochs_labels, 2e-4, seed)
    counts = {"n_labels": len(x), "n_bad": int((y == 1).sum()), "n_unsure": int((y == 0.5).sum())}
    report = {**counts, **{f"n_{kind}": len(one) for kind, (one, _) in sources.items()}}
    held = [name for name, is_one in zip(labelled, is_held) if is_one]
    report["held_out"] = measure_groups(score_all(part, x[is_held]), y[is_held], held)
    print(report, flush=True)
    toys = sources["toys"][0]  # good ones outweigh spoiled ones, some of which nobody could tell from them
    x, y = np.concatenate([x, toys]), np.append(y, np.zeros(len(toys)))
    if arguments.start:
        final = fit_labels(net, x, y, pairs, epochs_labels, 2e-4, seed + 1)
    else:
        final = fit_labels(part, x, y, pairs, 1, 1.5e-4, seed + 1)
    config = {"kind": "mask classifier", "report": report}
    save_weights(final, arguments.out, config, precision="fp16")
    print(describe_command(), describe_environment()["commit"], report, f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
