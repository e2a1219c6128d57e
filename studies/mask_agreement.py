"""Estimate defects of cut-outs from how the masks of two networks differ, as soft labels for the mask classifier.

    python studies/mask_agreement.py --data /photos --masks /masks --second /second --out /tmp/soft_labels.json

`--masks` holds the corrected masks, as studies/alignment.py takes them, and `--second` those of another network, such
as IS-Net; both hold a folder of a pack's name for each pack. The second network's errors are other ones, so a part that
only one mask has is often a defect (query by committee, Seung et al. 1992). Ten measures of the difference, and the
score of the released classifier, are fitted to data/mask_classifier/labels.json by logistic regression, whose
cross-validated area under the ROC curve is printed. The result holds the probability of a defect by `pack/file name`
for all photos that keep the limits."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _record import describe_command, mask_parser
from mask_classifier import PACKS, measure
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.data.align import CUT_SIDE, AlignConfig, cut_car
from carproto.data.mask_classifier import classifier_inputs, load_mask_classifier, score_mask
from carproto.data.mask_limits import check_limits
from carproto.data.masks import mask_name
from carproto.data.metadata import read_metadata
from carproto.data.segmenter import correct_mask, load_mask_corrector
from carproto.data.store import PictureStore
from carproto.files import load_json, save_json
from carproto.images import open_picture

UNSURE = 0.35  # target of a label that was not sure
N_FOLDS = 5


def largest_blob(differs: np.ndarray) -> int:
    """Return the pixels of the largest connected part, without lines of one pixel."""
    parts, n = ndimage.label(ndimage.binary_opening(differs, np.ones((2, 2))))
    return int(np.bincount(parts.ravel())[1:].max()) if n else 0


def compare_masks(mask: Image.Image, second: Image.Image, corrected: Image.Image) -> list[float]:
    """Return ten measures of how a mask differs from a second network's, as it is and corrected; 0 where equal."""
    first, other, again = (np.asarray(some, np.float32) / 255 for some in (mask, second, corrected))
    one, two, three = (values > 0.5 for values in (first, other, again))
    area, rows = max(1, int(one.sum())), np.nonzero(one.any(1))[0]
    is_low = np.zeros_like(one)
    is_low[int(rows[0] + 0.6 * (rows[-1] - rows[0])) :] = True
    blobs = (one & ~two, two & ~one, one & ~three, three & ~one, (one ^ three) & is_low, (one ^ two) & is_low)
    return [
        *(1 - (one & some).sum() / (one | some).sum() for some in (two, three)),
        *(largest_blob(differs) / area for differs in blobs),
        float(np.abs(first - other).sum()) / area,
        4 * float((other * (1 - other)).sum()) / area,
    ]


def describe_pack(pack: str, arguments: object) -> dict[str, list[float]]:
    """Return the classifier's logit and the ten measures of each photo that keeps the limits, by `pack/file name`."""
    store, config = PictureStore(arguments.data / f"{pack}.zip"), AlignConfig(aspect=arguments.aspect)
    rows, corrector, classifier, result = read_metadata(store), load_mask_corrector(), load_mask_classifier(), {}
    for name in tqdm(store.names, desc=pack, mininterval=10):
        content = store.read(name)
        files = [root / pack / mask_name(content) for root in (arguments.masks, arguments.second)]
        if not files[1].is_file():
            continue
        photo, (mask, second) = open_picture(content), [open_picture(file).convert("L") for file in files]
        view = rows[name].get("view") or rows[name].get("view_guess")
        if view not in config.views or check_limits(mask, config, stretch=arguments.aspect):
            continue
        try:
            car = cut_car(photo, mask, config, CUT_SIDE)
        except CarprotoError:
            continue
        score = score_mask(classifier, classifier_inputs(car, view in ("right", "front-right")))
        corrected = correct_mask(corrector, photo, second, passes=1)
        logit = float(np.log(score / (1 - score)))
        result[f"{pack}/{Path(name).name}"] = [logit, *compare_masks(mask, second, corrected)]
    return result


def standardize(values: np.ndarray, known: np.ndarray) -> torch.Tensor:
    """Return logarithms of the measures with mean 0 and deviation 1 over the known rows, and a column of ones."""
    values = np.concatenate([values[:, :1], np.log(values[:, 1:] + 0.004)], 1)
    values = (values - values[known].mean(0)) / values[known].std(0)
    return torch.from_numpy(np.concatenate([values, np.ones((len(values), 1))], 1))


def fit_logistic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the weights of a logistic regression with a small penalty on all but the last one."""
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weights, y) + 1e-3 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def main() -> None:
    """Compare, fit, measure and write."""
    parser = mask_parser(__doc__.splitlines()[0])
    parser.add_argument("--second", type=Path, required=True, help="masks of another network, like --masks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for pack in PACKS:
        rows |= describe_pack(pack, arguments)
    labels, names = load_json(arguments.labels), list(rows)
    known = np.array([labels.get(name, 0.12) != 0.12 for name in names])
    x = standardize(np.array([rows[name] for name in names]), known)
    y = np.array([labels[name] for name, one in zip(names, known) if one], float)
    targets = torch.from_numpy(np.where(y == 0.5, UNSURE, y))
    folds, guess = np.random.default_rng(arguments.seed).integers(0, N_FOLDS, len(y)), np.zeros(len(y))
    for fold in range(N_FOLDS):
        rest = torch.from_numpy(folds != fold)
        guess[folds == fold] = (x[known] @ fit_logistic(x[known][rest], targets[rest])).numpy()[folds == fold]
    alone = x[known][:, 0].numpy()
    print(describe_command(), {"classifier alone": measure(alone, y), "with agreement": measure(guess, y)})
    soft = torch.sigmoid(x @ fit_logistic(x[known], targets)).tolist()
    save_json({name: round(value, 3) for name, value in zip(names, soft)}, arguments.out)


if __name__ == "__main__":
    main()
