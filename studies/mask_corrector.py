"""Train the network that corrects the masks of cars, on spoiled masks of photos whose own mask is good.

    python studies/mask_corrector.py --data /photos --masks /masks --before /before --network mobilenet_v2.safetensors
        --scores /scores.json --out /tmp/mask_corrector

`--masks` and `--before` hold a folder of a pack's name for each pack: the masks as u2netp made them, and as an earlier
corrector left them. `--scores` holds the defect scores of the latter by `pack/file name`. Photos are taken that score
low, or that data/mask_classifier/labels.json calls good; those that it calls bad, and those of `--leave_out`, are not.
The target is the opacity that `cut_car` makes of the latter. A mask is spoiled: wheels, corners and other parts go,
strips of the ground, rims and second cars come in, or only a blob is left of it. Backgrounds are darkened or replaced.
Half way, photos are dropped whose own mask the network contradicts. The encoder starts from ImageNet's MobileNetV2.

`--second` holds masks of another network for each pack, as `--masks` does. Then the target is that mask, corrected once
by the released corrector, of photos where it overlaps with the mask of `--before` by 0.85 or more (IoU), half of the
masks stay as they are, and no scores are read.

The printed report compares the overlap (IoU) with that opacity on photos of the held-out packs, of the mask given and
of the corrected one.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _record import describe_command, mask_parser
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import CUT_SIDE, AlignConfig, cut_car
from carproto.data.backbone import start_stages
from carproto.data.mask_limits import check_limits
from carproto.data.masks import mask_name
from carproto.data.matte import bounding_box, main_part
from carproto.data.segmenter import MaskCorrector, correct_mask, corrector_box, load_mask_corrector
from carproto.data.store import PictureStore
from carproto.files import load_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import COMMON, FUTURISTIC, sample_factors
from carproto.weights import save_weights

SIDE = 128  # of the photos, pixels
TRAIN, HELD = ("common_cars_train", "concept_cars_train"), ("common_cars_heldout", "concept_cars_heldout")
SIZE = (160, 128)  # of the network's input
GOOD = (0, 0.12)  # labels of good cut-outs
LIMITS = {"common": 0.1, "concept": 0.16}  # of the defect score of photos that are taken
N_HELD = 200
SAME = 0.85  # overlap (IoU) of a second network's mask, from which it is taken
RATES = (4e-4, 2e-3)  # largest learning rates of encoder and decoder


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a map (H, W)."""
    return ndimage.gaussian_filter(values.astype(np.float32), sigma)


def open_photos(packs: tuple, arguments: object, left_out: set[str]) -> dict[str, np.ndarray]:
    """Return photo, mask, opacity and the mask corrected before (128, 128, 6) of good photos, by `pack/file name`."""
    photos, config = {}, AlignConfig(aspect=arguments.aspect)
    labels, scores = load_json(arguments.labels), load_json(arguments.scores) if arguments.scores else {}
    for pack in packs:
        store = PictureStore(arguments.data / f"{pack}.zip")
        for name in tqdm(store.names, desc=pack):
            key = f"{pack}/{Path(name).name}"
            label, score = labels.get(key), scores.get(key, 1)
            is_good = label in GOOD[:1] or (label in (*GOOD, None) and score < LIMITS[pack.split("_")[0]])
            if key in left_out or not (is_good or arguments.second):
                continue
            content = store.read(name)
            if arguments.second:
                layers = read_second(content, pack, arguments, config)
                if layers is not None:
                    photos[key] = layers
                continue
            masks = [open_picture(root / pack / mask_name(content)) for root in (arguments.masks, arguments.before)]
            photo, (mask, before) = open_picture(content), [one.convert("L") for one in masks]
            if photo.size != (SIDE, SIDE):
                continue
            try:
                car = cut_car(photo, before, config, CUT_SIDE)
            except CarprotoError:
                continue
            left, top, right, bottom = bounding_box(main_part(np.asarray(before) > 127)[0])
            rim = 2 + 0.1 * max(right - left, bottom - top)  # of `cut_car`
            box = max(0, left - rim), max(0, top - rim), min(SIDE, right + rim), min(SIDE, bottom + rim)
            alpha = Image.fromarray((255 * car.alpha).astype(np.uint8))
            scale = alpha.width / (box[2] - box[0]), alpha.height / (box[3] - box[1])
            transform = (scale[0], 0, -box[0] * scale[0], 0, scale[1], -box[1] * scale[1])
            alpha = alpha.transform(photo.size, Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR)
            photos[key] = np.dstack([photo.convert("RGB"), mask.resize(photo.size), alpha, before.resize(photo.size)])
    return photos


def read_second(content: bytes, pack: str, arguments: object, config: AlignConfig) -> np.ndarray | None:
    """Return layers whose target is a second network's mask, corrected; None where the two masks differ too much."""
    files = [root / pack / mask_name(content) for root in (arguments.masks, arguments.before, arguments.second)]
    photo = open_picture(content)
    if not files[2].is_file() or photo.size != (SIDE, SIDE):
        return None
    mask, before, second = (open_picture(file).convert("L") for file in files)
    target = correct_mask(load_mask_corrector(), photo, second, passes=1)
    one, other = (np.asarray(values) > 127 for values in (before, target))
    overlap = (one & other).sum() / max(1, (one | other).sum())
    if overlap < SAME or check_limits(target, config, stretch=arguments.aspect):
        return None
    return np.dstack([photo.convert("RGB"), mask, target, second])


def render_toys(n: int) -> list[np.ndarray]:
    """Return toy cars with their true mask (128, 128, 6)."""
    toys = []
    for i in range(n):
        view = ("left", "front-left", "front-right")[i % 3]
        rgb, is_car = render_car(sample_factors(77, i, COMMON if i % 2 else FUTURISTIC, view=view), SIDE)
        toys.append(np.dstack([rgb, *[is_car.astype(np.uint8) * 255] * 3]))
    return toys


def sample_blob(rng: np.random.Generator, box: tuple) -> np.ndarray:
    """Return an ellipse, one side of a line, or a rectangle, at random on a box."""
    y, x = np.mgrid[:SIDE, :SIDE]
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    kind = rng.integers(3)
    if kind == 0:
        centre = rng.uniform(left - 0.1 * width, right + 0.1 * width), rng.uniform(top - 0.1 * height, bottom)
        radii = rng.uniform(0.06, 0.3) * width, rng.uniform(0.06, 0.3) * height
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1
    if kind == 1:
        return sample_side(rng, box, rng.uniform(0.5, 0.95))
    x0, y0 = rng.uniform(left - 0.1 * width, right), rng.uniform(top - 0.1 * height, bottom)
    return (
        (x >= x0) & (x < x0 + rng.uniform(0.06, 0.35) * width) & (y >= y0) & (y < y0 + rng.uniform(0.06, 0.25) * height)
    )


def sample_part(rng: np.random.Generator, box: tuple) -> np.ndarray:
    """Return a wheel, a corner or an end of a car with a ragged outline, or a blob anywhere, at random on a box."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    kind = rng.random()
    if kind < 0.35:
        return sample_blob(rng, box)
    y, x = np.mgrid[:SIDE, :SIDE]
    side = rng.choice([-1, 1])
    if kind < 0.75:  # a wheel, or the ground side of the car
        share = rng.uniform(0, 1) if rng.random() < 0.4 else 0.5 + side * rng.uniform(0.2, 0.5)
        centre, radii = (left + share * width, bottom - rng.uniform(-0.05, 0.3) * height), (0.05, 0.16, 0.1, 0.36)
    else:  # a corner or an end
        centre = left + (0.5 + side * rng.uniform(0.42, 0.55)) * width, top + rng.uniform(0, 0.9) * height
        radii = (0.05, 0.18, 0.12, 0.45)
    ragged = 1 + rng.uniform(0, 0.8) * blur(rng.normal(size=(SIDE, SIDE)), 2.5) * 7
    across, up = rng.uniform(*radii[:2]) * width, rng.uniform(*radii[2:]) * height
    return ((x - centre[0]) / across) ** 2 + ((y - centre[1]) / up) ** 2 < ragged


def sample_side(rng: np.random.Generator, box: tuple, distance: float) -> np.ndarray:
    """Return what lies beyond a line at a distance from the middle of a box, in half its size."""
    y, x = np.mgrid[:SIDE, :SIDE]
    left, top, right, bottom = box
    angle = rng.uniform(0, 2 * np.pi)
    across = (2 * x - left - right) / (right - left) * np.cos(angle)
    return across + (2 * y - top - bottom) / (bottom - top) * np.sin(angle) > distance


def spoil(mask: np.ndarray, alpha: np.ndarray, rng: np.random.Generator, as_it_is: float = 0.0) -> np.ndarray:
    """Return a mask (128, 128), 0 to 1, as it is (a share, then one in five), blurred, as a blob, or with defects."""
    values, is_car = mask.astype(np.float32) / 255, alpha > 127
    box = bounding_box(is_car)
    width, height = box[2] - box[0], box[3] - box[1]
    if as_it_is and rng.random() < as_it_is:
        return values
    kind = rng.random()
    if kind < 0.26:
        return values if kind < 0.2 else blur(values, rng.uniform(1, 4))
    if kind < 0.36:  # little is known but where it is
        y, x = np.mgrid[:SIDE, :SIDE]
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        inside = ((2 * x - 2 * middle[0]) / width) ** 4 + ((2 * y - 2 * middle[1]) / height) ** 4
        values = blur(inside < rng.uniform(0.5, 1.1), rng.uniform(1, 5)) if rng.random() < 0.6 else blur(values, 6)
        return (values * rng.uniform(0.7, 1)).clip(0, 1)
    for _ in range(rng.integers(1, 5)):
        kind, strength = rng.integers(8), rng.uniform(0.6, 1)
        if kind <= 3:  # a part is missing
            values = values * (1 - strength * blur(sample_part(rng, box), rng.uniform(0.3, 1.5)))
        elif kind == 4:  # something is attached
            near = ndimage.binary_dilation(is_car, iterations=int(rng.integers(2, max(3, width // 7))))
            values = np.maximum(values, strength * blur(sample_blob(rng, box) & near, rng.uniform(0.3, 1.2)))
        elif kind == 5:  # a rim on one side
            rim = ndimage.binary_dilation(is_car, iterations=int(rng.integers(1, max(2, width // 18) + 1)))
            values = np.maximum(values, strength * blur(rim & sample_side(rng, box, rng.uniform(-0.6, 0.2)), 0.7))
        elif kind == 6:  # a shadow
            n, start = int(rng.integers(2, max(3, width // 10))), rng.uniform(box[0], box[2] - 0.2 * width)
            y, x = np.mgrid[:SIDE, :SIDE]
            lower = np.zeros_like(is_car)
            lower[n:] = is_car[:-n]
            lower &= (x > start) & (x < start + rng.uniform(0.2, 1) * width) & (y > box[3] - 0.3 * height)
            values = np.maximum(values, strength * blur(lower, 0.7))
        else:  # an outline that cuts the car
            n = int(rng.integers(1, max(2, width // 25) + 1))
            less = np.minimum(values, blur(ndimage.binary_erosion(is_car, iterations=n, border_value=1), 0.7))
            values = np.where(sample_side(rng, box, rng.uniform(-0.6, 0.2)), less, values)
    return values.clip(0, 1)


def crop_layers(layers: np.ndarray) -> np.ndarray | None:
    """Return the corrector's input of layers (128, 128, 5), as (128, 160, 5); None for a mask that is too small."""
    box = corrector_box(Image.fromarray(np.ascontiguousarray(layers[..., 3])))
    if box is None or box[2] - box[0] < 20 or box[3] - box[1] < 14:
        return None
    channels = [Image.fromarray(np.ascontiguousarray(layers[..., channel])) for channel in range(5)]
    return np.dstack([channel.resize(SIZE, Image.Resampling.BILINEAR, box) for channel in channels])


def change_surroundings(layers: np.ndarray, photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return the colours of a car (128, 128, 3): its background replaced, or dark as its tyres, or its lower part dark.

    Where the background is replaced, little of it shows through the outline, since the opacity is steep there.
    """
    colours, alpha = layers[..., :3].astype(np.float32), layers[..., 4:5] / np.float32(255)
    left, top, right, bottom = bounding_box(layers[..., 4] > 127)
    kind, back = rng.random(), colours
    y = ((np.arange(SIDE) - top) / (bottom - top))[:, None, None]
    if kind < 0.2:
        other = photos[rng.integers(len(photos))]
        back = np.roll(other[..., :3], int(rng.integers(SIDE)) if rng.random() < 0.5 else 0, 1).astype(np.float32)
    if rng.random() < 0.35:  # the ground gets dark, or flat and of the colour of some part of the lower car
        tyre = colours[np.nonzero((layers[..., 4] > 250) & (y[..., 0] > 0.7))]
        colour = tyre[rng.integers(len(tyre))] if len(tyre) else np.zeros(3)
        share = rng.uniform(0.3, 1) * ((y - rng.uniform(0.2, 0.8)) * rng.uniform(2, 8)).clip(0, 1)
        back = back * (1 - share) + share * colour * rng.uniform(0.6, 1.2)
    if rng.random() < 0.2:
        colours = colours * (1 - rng.uniform(0.2, 0.8) * ((y - rng.uniform(0.3, 0.8)) * rng.uniform(2, 8)).clip(0, 1))
    return (colours * alpha + back * (1 - alpha)).clip(0, 255).astype(np.uint8)


def place_behind(layers: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste another car behind a car; return the colours and where the other is visible, 0 to 1."""
    side = int(SIDE * rng.uniform(0.5, 1.1))
    other = other[:, ::-1] if rng.random() < 0.5 else other
    small = [Image.fromarray(np.ascontiguousarray(other[..., channel])).resize((side, side)) for channel in range(6)]
    x, y = int(rng.integers(side // 4, SIDE + side * 3 // 4)), side + int(rng.uniform(-0.35, 0.15) * SIDE)
    wide = np.zeros((SIDE + 2 * side, SIDE + 2 * side, 6), np.uint8)
    wide[y : y + side, x : x + side] = np.dstack(small)
    behind = wide[side : side + SIDE, side : side + SIDE]
    visible = behind[..., 4] / 255 * (1 - layers[..., 4] / 255)
    return layers[..., :3] * (1 - visible[..., None]) + behind[..., :3] * visible[..., None], visible


def change_background(toy: np.ndarray, photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Place a toy car before a photo, before noise, or leave it, and soften its mask at times."""
    kind, alpha = rng.random(), toy[..., 4:5] / 255
    if kind < 0.6:
        noise = Image.fromarray(rng.integers(0, 255, (14, 14, 3), dtype=np.uint8))
        photo = np.roll(photos[rng.integers(len(photos))][..., :3], int(rng.integers(SIDE)), 1)
        back = photo if kind < 0.3 else np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        toy = np.dstack([(toy[..., :3] * alpha + back * (1 - alpha)).astype(np.uint8), toy[..., 3:]])
    if rng.random() < 0.4:
        toy = np.dstack([toy[..., :3], blur(toy[..., 3], rng.uniform(0, 1.6)).astype(np.uint8), toy[..., 4:]])
    return toy


def sample_input(photos: list, toys: list, rng: np.random.Generator, as_it_is: float = 0.0) -> np.ndarray:
    """Return the layers of a car with a spoiled mask (128, 160, 5); one in five stands before a second car."""
    while True:
        layers = photos[rng.integers(len(photos))]
        if rng.random() < 0.05:
            layers = change_background(toys[rng.integers(len(toys))], photos, rng)
        elif rng.random() < 0.5:
            layers = np.dstack([change_surroundings(layers, photos, rng), layers[..., 3:]])
        colours, mask = layers[..., :3], spoil(layers[..., rng.choice([3, 3, 5, 4])], layers[..., 4], rng, as_it_is)
        if rng.random() < 0.2:
            colours, visible = place_behind(layers, photos[rng.integers(len(photos))], rng)
            kind = rng.random()
            near = ndimage.binary_dilation(layers[..., 4] > 127, iterations=int(rng.integers(3, 14)))
            taken = visible if kind < 0.4 else visible * blur(near, 1) if kind < 0.8 else 0 * visible
            mask = np.maximum(mask, taken * rng.uniform(0.5, 1))
        changed = crop_layers(np.dstack([colours, 255 * mask, layers[..., 4]]).astype(np.uint8))
        if changed is not None:
            return changed[:, ::-1] if rng.random() < 0.5 else changed


def to_batch(layers: np.ndarray) -> torch.Tensor:
    """Return colours and mask (N, 4, 128, 160), -1 to 1."""
    x = torch.from_numpy(np.ascontiguousarray(layers[..., :4])).permute(0, 3, 1, 2)
    return x.float().contiguous(memory_format=torch.channels_last) / 127.5 - 1


def correct(net: MaskCorrector, x: torch.Tensor) -> torch.Tensor:
    """Return the logits of the corrected masks (N, 128, 160)."""
    mask = 0.5 * x[:, 3] + 0.5
    return torch.log((mask + 0.02) / (1.02 - mask)) + net(x)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Change contrast, brightness and colour at random; make some photos dark, and some grey."""
    n, x = len(x), x.clone()
    colours = (x[:, :3] * (0.6 + 0.6 * torch.rand(n, 1, 1, 1)) + 0.15 * torch.randn(n, 3, 1, 1)).clamp(-1, 1)
    gamma = torch.where(torch.rand(n, 1, 1, 1) < 0.3, 1 + 1.5 * torch.rand(n, 1, 1, 1), torch.ones(n, 1, 1, 1))
    colours = 2 * ((colours + 1) / 2).clamp_min(1e-4) ** gamma - 1
    is_grey = torch.rand(n) < 0.1
    colours[is_grey] = colours[is_grey].mean(1, keepdim=True)
    x[:, :3] = colours
    return x


@torch.inference_mode()
def contradict(net: MaskCorrector, photos: list[np.ndarray]) -> np.ndarray:
    """Return the largest area that the network adds to each photo's own mask or takes away, a share of the car's."""
    areas = []
    for layers in tqdm(photos, desc="own masks"):
        cropped = crop_layers(layers[..., [0, 1, 2, 5, 4]])
        if cropped is None:
            areas.append(1.0)
            continue
        is_car, found = cropped[..., 4] > 127, (correct(net, to_batch(cropped[None]))[0] > 0).numpy()
        other = ndimage.binary_opening(is_car != found, np.ones((3, 3)))
        areas.append(main_part(other)[1][0] / is_car.sum() if other.any() else 0.0)
    return np.array(areas)


def average(net: MaskCorrector, ema: dict, step: int) -> None:
    """Update the EMA of weights."""
    for name, value in net.state_dict().items():
        if name in ema and value.dtype.is_floating_point:
            ema[name].lerp_(value, 1 - min(0.995, step / (step + 10)))
        else:
            ema[name] = value.clone()


def drop_contradicted(net: MaskCorrector, photos: list[np.ndarray]) -> list[np.ndarray]:
    """Drop the photos whose own mask the network contradicts most, one in eight, unless by less than 1 %."""
    areas = contradict(net, photos)
    is_kept = areas < max(0.01, np.quantile(areas, 0.88))
    print(f"{(~is_kept).sum()} photos dropped", np.quantile(areas, [0.5, 0.8, 0.88, 0.95]), flush=True)
    return [one for one, keep in zip(photos, is_kept) if keep]


def fit(
    net: MaskCorrector,
    photos: list,
    toys: list,
    seconds: float,
    shares: tuple,
    rng: np.random.Generator,
    as_it_is: float = 0.0,
) -> int:
    """Fit a network for some seconds of CPU time; it ends as the EMA of its weights. Return the number of steps.

    The learning rate falls from the first to the second of two shares of its largest value.
    """
    ema, pool, step, start, losses, batch = {}, [], 0, time.process_time(), [], 16
    decoder = [*net.bottom.parameters(), *net.up.parameters(), *net.out.parameters()]
    optimizer = torch.optim.AdamW([{"params": net.stages.parameters()}, {"params": decoder}], weight_decay=1e-2)
    net.train()
    while (share := (time.process_time() - start) / seconds) < 1:
        level = shares[1] + (shares[0] - shares[1]) * (0.5 + 0.5 * np.cos(np.pi * share))
        for group, rate in zip(optimizer.param_groups, RATES):
            group["lr"] = rate * level * min(1, step / 100 + 0.01)
        if len(pool) < 40 * batch or step % 2 == 0:
            pool = [*pool, *(sample_input(photos, toys, rng, as_it_is) for _ in range(batch))][-4000:]
        layers = np.stack([pool[i] for i in rng.integers(0, len(pool), batch)])
        target, x = torch.from_numpy(layers[..., 4].astype(np.float32) / 255), augment(to_batch(layers))
        with torch.autocast("cpu", torch.bfloat16):
            change = net(x)
        mask = 0.5 * x[:, 3] + 0.5
        logits = torch.log((mask + 0.02) / (1.02 - mask)) + change.float()
        weight = 1 + ((mask - target).abs() > 0.4)
        loss = (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        average(net, ema, step)
        if step % 100 == 0:
            print(f"step {step}, {share:.0%}, loss {np.mean(losses[-100:]):.4f}", flush=True)
    net.load_state_dict(ema)
    net.eval()
    return step


@torch.inference_mode()
def measure(net: MaskCorrector, photos: list[np.ndarray], rng: np.random.Generator) -> dict:
    """Return quantiles of the overlap with the opacity, of masks as u2netp made them and of spoiled ones."""
    report = {}
    for kind in ("own", "spoiled"):
        masks = [255 * spoil(one[..., 3], one[..., 4], rng) if kind == "spoiled" else one[..., 3] for one in photos]
        pairs = zip(photos, masks)
        cropped = [crop_layers(np.dstack([one[..., :3], mask, one[..., 4]]).astype(np.uint8)) for one, mask in pairs]
        layers = np.stack([one for one in cropped if one is not None])
        x, is_car = to_batch(layers), torch.from_numpy(layers[..., 4] > 127)
        results = torch.cat([correct(net, one) > 0 for one in x.split(16)])
        for when, found in (("given", x[:, 3] > 0), ("corrected", results)):
            overlap = (found & is_car).sum((1, 2)) / (found | is_car).sum((1, 2))
            quantiles = torch.quantile(overlap, torch.tensor([0.05, 0.25, 0.5])).tolist()
            report[f"{kind}_{when}"] = [round(value, 4) for value in quantiles]
    return report


def main() -> None:
    """Prepare, train, measure and write."""
    parser = mask_parser(__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="masks that an earlier corrector made, like --masks")
    parser.add_argument("--second", type=Path, help="masks of another network, like --masks")
    parser.add_argument("--scores", type=Path, help="defect scores of these, by `pack/file name`")
    parser.add_argument("--network", type=Path, required=True, help="safetensors of ImageNet's MobileNetV2")
    parser.add_argument("--leave_out", type=Path, help="JSON with `keys` of photos that are not trained on")
    parser.add_argument("--start", type=Path, help="weights of the first half, which is not fitted again")
    parser.add_argument("--seconds", nargs=2, type=float, default=(630, 450), help="CPU time of both halves of the fit")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    left_out = set(load_json(arguments.leave_out)["keys"]) if arguments.leave_out else set()
    photos = open_photos(TRAIN, arguments, left_out)
    held = list(open_photos(HELD, arguments, left_out).values())
    held = held[:: max(1, len(held) // N_HELD)][:N_HELD]
    toys, chosen, n_steps = render_toys(160), list(photos.values()), 0
    if arguments.start:
        net = load_mask_corrector(str(arguments.start))
    else:
        net = MaskCorrector().to(memory_format=torch.channels_last)
        start_stages(net.stages, arguments.network)
        n_steps = fit(net, chosen, toys, arguments.seconds[0], (1, 0.55), rng)
        save_weights(net, arguments.out / "half", {"kind": "mask corrector", "widths": list(net.widths)})
    kept = chosen if arguments.second else drop_contradicted(net, chosen)
    n_steps += fit(net, kept, toys, arguments.seconds[1], (0.55, 0.005), rng, 0.5 if arguments.second else 0.0)
    counts = {"n_photos": len(kept), "n_dropped": len(chosen) - len(kept), "n_held": len(held), "n_steps": n_steps}
    report = {**counts, **measure(net, held, rng)}
    config = {"kind": "mask corrector", "widths": list(net.widths), "report": report}
    save_weights(net, arguments.out, config, precision="fp16")
    print(describe_command(), describe_environment()["commit"], report)


if __name__ == "__main__":
    main()
