"""Train the network that corrects the masks of cars, on spoiled masks of photos whose own mask is good.

    python studies/mask_corrector.py --data /photos --masks /masks --out /tmp/mask_corrector

Photos come from data/mask_classifier/labels.json, those labelled as good. `--masks` holds a folder of a pack's name
for each pack, with the masks as u2netp made them, not corrected yet. A mask is spoiled: parts go, strips of the
ground, rims and second cars come in. The network learns the opacity that `cut_car` makes of the mask as it was. The
printed report compares the overlap (IoU) with that opacity on photos held out of training, of the mask given and of the
corrected one.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _record import describe_command, mask_parser
from mask_classifier import PACKS
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import CUT_SIDE, AlignConfig, cut_car
from carproto.data.masks import mask_name
from carproto.data.matte import bounding_box
from carproto.data.segmenter import MaskCorrector, corrector_box
from carproto.data.store import PictureStore
from carproto.files import load_json
from carproto.images import open_picture
from carproto.run import describe_environment
from carproto.toycars.paint import render_car
from carproto.toycars.shape import COMMON, FUTURISTIC, sample_factors
from carproto.weights import save_weights

SIDE = 128  # of the photos, pixels
N_HELD = 150
GOOD = (0, 0.12)  # labels of good cut-outs


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a map (H, W)."""
    return ndimage.gaussian_filter(values.astype(np.float32), sigma)


def open_photos(data: Path, masks: Path, labels: dict, aspect: float) -> list[np.ndarray]:
    """Return photo, mask and opacity (128, 128, 5) of the photos labelled as good."""
    photos, config = [], AlignConfig(aspect=aspect)
    for pack in PACKS:
        store = PictureStore(data / f"{pack}.zip")
        for name in tqdm(store.names, desc=pack):
            if labels.get(f"{pack}/{Path(name).name}") not in GOOD:
                continue
            content = store.read(name)
            photo, mask = open_picture(content), open_picture(masks / pack / mask_name(content)).convert("L")
            if photo.size != (SIDE, SIDE):
                continue
            try:
                car = cut_car(photo, mask, config, CUT_SIDE)
            except CarprotoError:
                continue
            box = corrector_box(mask)
            alpha = Image.fromarray((255 * car.alpha).astype(np.uint8))
            scale = alpha.width / (box[2] - box[0]), alpha.height / (box[3] - box[1])
            transform = (scale[0], 0, -box[0] * scale[0], 0, scale[1], -box[1] * scale[1])
            alpha = alpha.transform(photo.size, Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR)
            photos.append(np.dstack([photo.convert("RGB"), mask.resize(photo.size), alpha]))
    return photos


def render_toys(n: int) -> list[np.ndarray]:
    """Return toy cars with their true mask (128, 128, 5)."""
    toys = []
    for i in range(n):
        view = ("left", "front-left", "front-right")[i % 3]
        rgb, is_car = render_car(sample_factors(77, i, COMMON if i % 2 else FUTURISTIC, view=view), SIDE)
        toys.append(np.dstack([rgb, is_car.astype(np.uint8) * 255, is_car.astype(np.uint8) * 255]))
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


def sample_side(rng: np.random.Generator, box: tuple, distance: float) -> np.ndarray:
    """Return what lies beyond a line at a distance from the middle of a box, in half its size."""
    y, x = np.mgrid[:SIDE, :SIDE]
    left, top, right, bottom = box
    angle = rng.uniform(0, 2 * np.pi)
    across = (2 * x - left - right) / (right - left) * np.cos(angle)
    return across + (2 * y - top - bottom) / (bottom - top) * np.sin(angle) > distance


def spoil(mask: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (128, 128), 0 to 1, as it is (one in five), blurred, or with up to three defects."""
    values, is_car = mask.astype(np.float32) / 255, alpha > 127
    box = bounding_box(is_car)
    width, height = box[2] - box[0], box[3] - box[1]
    kind = rng.random()
    if kind < 0.28:
        return values if kind < 0.2 else blur(values, rng.uniform(1, 4))
    for _ in range(rng.integers(1, 4)):
        kind, strength = rng.integers(6), rng.uniform(0.6, 1)
        if kind <= 1:  # a part is missing
            values = values * (1 - strength * blur(sample_blob(rng, box), rng.uniform(0.3, 1.5)))
        elif kind == 2:  # something is attached
            near = ndimage.binary_dilation(is_car, iterations=int(rng.integers(2, max(3, width // 7))))
            values = np.maximum(values, strength * blur(sample_blob(rng, box) & near, rng.uniform(0.3, 1.2)))
        elif kind == 3:  # a rim on one side
            rim = ndimage.binary_dilation(is_car, iterations=int(rng.integers(1, max(2, width // 18) + 1)))
            values = np.maximum(values, strength * blur(rim & sample_side(rng, box, rng.uniform(-0.6, 0.2)), 0.7))
        elif kind == 4:  # a shadow
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
    """Return the corrector's input of layers (128, 128, 5), as (80, 96, 5); None for a mask that is too small."""
    box = corrector_box(Image.fromarray(np.ascontiguousarray(layers[..., 3])))
    if box is None or box[2] - box[0] < 20 or box[3] - box[1] < 14:
        return None
    channels = [Image.fromarray(np.ascontiguousarray(layers[..., channel])) for channel in range(5)]
    return np.dstack([channel.resize((96, 80), Image.Resampling.BILINEAR, box) for channel in channels])


def place_behind(layers: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste another car behind a car; return the colours and where the other is visible, 0 to 1."""
    side = int(SIDE * rng.uniform(0.5, 1.1))
    other = other[:, ::-1] if rng.random() < 0.5 else other
    small = [Image.fromarray(np.ascontiguousarray(other[..., channel])).resize((side, side)) for channel in range(5)]
    x, y = int(rng.integers(side // 4, SIDE + side * 3 // 4)), side + int(rng.uniform(-0.35, 0.15) * SIDE)
    wide = np.zeros((SIDE + 2 * side, SIDE + 2 * side, 5), np.uint8)
    wide[y : y + side, x : x + side] = np.dstack(small)
    behind = wide[side : side + SIDE, side : side + SIDE]
    visible = behind[..., 4] / 255 * (1 - layers[..., 4] / 255)
    return layers[..., :3] * (1 - visible[..., None]) + behind[..., :3] * visible[..., None], visible


def change_background(toy: np.ndarray, photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Place a toy car before a photo, before noise, or leave it, and soften its mask at times."""
    kind, alpha = rng.random(), toy[..., 4:] / 255
    if kind < 0.6:
        noise = Image.fromarray(rng.integers(0, 255, (14, 14, 3), dtype=np.uint8))
        photo = np.roll(photos[rng.integers(len(photos))][..., :3], int(rng.integers(SIDE)), 1)
        back = photo if kind < 0.3 else np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        toy = np.dstack([(toy[..., :3] * alpha + back * (1 - alpha)).astype(np.uint8), toy[..., 3:]])
    if rng.random() < 0.4:
        toy = np.dstack([toy[..., :3], blur(toy[..., 3], rng.uniform(0, 1.6)).astype(np.uint8), toy[..., 4]])
    return toy


def sample_input(photos: list[np.ndarray], toys: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return the layers of a car with a spoiled mask (80, 96, 5); one in five stands before a second car."""
    while True:
        is_toy = rng.random() < 0.06
        layers = photos[rng.integers(len(photos))]
        if is_toy:
            layers = change_background(toys[rng.integers(len(toys))], photos, rng)
        colours, mask = layers[..., :3], spoil(layers[..., 3], layers[..., 4], rng)
        if rng.random() < 0.22:
            colours, visible = place_behind(layers, photos[rng.integers(len(photos))], rng)
            kind = rng.random()
            near = ndimage.binary_dilation(layers[..., 4] > 127, iterations=int(rng.integers(3, 14)))
            taken = visible if kind < 0.4 else visible * blur(near, 1) if kind < 0.8 else 0 * visible
            mask = np.maximum(mask, taken * rng.uniform(0.5, 1))
        changed = crop_layers(np.dstack([colours, 255 * mask, layers[..., 4]]).astype(np.uint8))
        if changed is not None:
            return changed[:, ::-1] if rng.random() < 0.5 else changed


def to_batch(layers: np.ndarray) -> torch.Tensor:
    """Return colours and mask (N, 4, 80, 96), -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(layers[..., :4])).permute(0, 3, 1, 2).float() / 127.5 - 1


def correct(net: MaskCorrector, x: torch.Tensor) -> torch.Tensor:
    """Return the logits of the corrected masks (N, 80, 96)."""
    mask = 0.5 * x[:, 3] + 0.5
    return torch.log((mask + 0.02) / (1.02 - mask)) + net(x)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Change contrast and colour at random."""
    n, x = len(x), x.clone()
    x[:, :3] = (x[:, :3] * (0.8 + 0.4 * torch.rand(n, 1, 1, 1)) + 0.15 * torch.randn(n, 3, 1, 1)).clamp(-1, 1)
    return x


def fit(photos: list, toys: list, seconds: float, rng: np.random.Generator, batch: int = 24) -> MaskCorrector:
    """Fit a network for some seconds of CPU time; return its EMA weights."""
    net, ema, pool, step, start = MaskCorrector(), {}, [], 0, time.process_time()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 100 + 0.01) * (0.5 + 0.5 * np.cos(np.pi * share) + 0.01)
        if step < 150 or step % 2 == 0:
            pool = [*pool, *(sample_input(photos, toys, rng) for _ in range(batch))][-6000:]
        layers = np.stack([pool[i] for i in rng.integers(0, len(pool), batch)])
        target = torch.from_numpy(layers[..., 4].astype(np.float32) / 255)
        loss = F.binary_cross_entropy_with_logits(correct(net, augment(to_batch(layers))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        for name, value in net.state_dict().items():
            if name in ema and value.dtype.is_floating_point:
                ema[name].lerp_(value, 1 - min(0.98, step / (step + 10)))
            else:
                ema[name] = value.clone()
    print(f"{step} steps, loss {loss.item():.3f}")
    net.load_state_dict(ema)
    return net.eval()


@torch.inference_mode()
def measure(net: MaskCorrector, photos: list[np.ndarray], rng: np.random.Generator) -> dict:
    """Return quantiles of the overlap with the opacity, of masks as they are and of spoiled ones."""
    report = {}
    for kind in ("own", "spoiled"):
        masks = [255 * spoil(one[..., 3], one[..., 4], rng) if kind == "spoiled" else one[..., 3] for one in photos]
        pairs = zip(photos, masks)
        cropped = [crop_layers(np.dstack([one[..., :3], mask, one[..., 4]]).astype(np.uint8)) for one, mask in pairs]
        layers = np.stack([one for one in cropped if one is not None])
        x, is_car = to_batch(layers), torch.from_numpy(layers[..., 4] > 127)
        for when, found in (("given", x[:, 3] > 0), ("corrected", correct(net, x) > 0)):
            overlap = (found & is_car).sum((1, 2)) / (found | is_car).sum((1, 2))
            quantiles = torch.quantile(overlap, torch.tensor([0.05, 0.25, 0.5])).tolist()
            report[f"{kind}_{when}"] = [round(value, 4) for value in quantiles]
    return report


def main() -> None:
    """Prepare, train, measure and write."""
    parser = mask_parser(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200, help="CPU time of the fit")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    photos = open_photos(arguments.data, arguments.masks, load_json(arguments.labels), arguments.aspect)
    step = len(photos) // N_HELD
    held, seen = photos[::step][:N_HELD], [one for i, one in enumerate(photos) if i % step or i // step >= N_HELD]
    net = fit(seen, render_toys(160), arguments.seconds, rng)
    report = {"n_photos": len(seen), "n_held": len(held), **measure(net, held, rng)}
    config = {"kind": "mask corrector", "widths": list(net.widths), "report": report}
    save_weights(net, arguments.out, config, half=True)
    print(describe_command(), describe_environment()["commit"], report)


if __name__ == "__main__":
    main()
