"""Cross-validate the view classifier on labelled photos, with and without unlabelled photos.

    python studies/view_accuracy.py --views views.zip --backbone mobilenet_v2.safetensors \\
        --unlabelled common.zip concept.zip

It writes data/records/views.json. Within a run nothing is chosen by looking at the test folds: the settings are the
defaults of `carproto.data.views`. But those defaults were found by trying some dozens of settings on the same photos,
in the foldings of other seeds (from 10 on), so the result is a little kind. Of the unlabelled photos nothing but the
pictures is used; copies of labelled photos and pictures that are drawn by a game are left out."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from _record import save_record
from PIL import Image
from tqdm import tqdm

from carproto.data.backbone import ViewFeatureExtractor
from carproto.data.comparison import hash_pictures, make_thumbnails
from carproto.data.duplicates import near_duplicates
from carproto.data.metadata import read_metadata
from carproto.data.store import PictureStore
from carproto.data.views import (
    ViewClassifier,
    choose_confidence,
    cross_validate,
    evaluate_views,
    fit_view_head,
    save_view_classifier,
    view_features,
)
from carproto.images import fit_square, open_picture, to_tensor


def read_labelled(path: str) -> tuple[list, list[str]]:
    """Return square pictures and their views."""
    store = PictureStore(path)
    rows = read_metadata(store)
    names = [name for name in store.names if rows.get(name, {}).get("view")]
    return [fit_square(open_picture(store.read(name)), 128, "letterbox") for name in names], [
        rows[name]["view"] for name in names
    ]


def read_unlabelled(path: str, n: int, seed: int, squashed: bool) -> list:
    """Return random square photos; squashed ones get their usual shape back before they are letterboxed."""
    store, rng = PictureStore(path), np.random.default_rng(seed)
    rows, pictures = read_metadata(store), []
    names = [name for name in store.names if rows.get(name, {}).get("kind") != "render"]
    for i in tqdm(np.sort(rng.permutation(len(names))[:n]), desc="unlabelled"):
        picture = open_picture(store.read(names[i]))
        if squashed:
            picture = picture.resize((128, round(128 / rng.uniform(1.33, 1.5))), Image.Resampling.LANCZOS)
        pictures.append(fit_square(picture, 128, "letterbox"))
    return pictures


def without_copies(pictures: list, labelled: list) -> list:
    """Leave out pictures that are copies of labelled ones."""
    everything = [*labelled, *pictures]
    clusters = near_duplicates(hash_pictures(everything), make_thumbnails(everything))
    copies = {i for cluster in clusters if cluster[0] < len(labelled) for i in cluster}
    return [picture for i, picture in enumerate(pictures, len(labelled)) if i not in copies]


def read_features(arguments, labelled: list) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return features of labelled and unlabelled photos, from the cache where it has them."""
    if arguments.cache and arguments.cache.exists():
        return tuple(part.float() for part in torch.load(arguments.cache, weights_only=True))
    backbone, parts = ViewFeatureExtractor(arguments.backbone, arguments.size), [labelled]
    if arguments.unlabelled:
        sets = [
            read_unlabelled(path, arguments.n_unlabelled, 0, not arguments.not_squashed)
            for path in arguments.unlabelled
        ]
        parts.append(without_copies([picture for one in sets for picture in one], labelled))
    parts = [view_features(to_tensor(part), backbone, quiet=False).half() for part in parts]
    if arguments.cache:
        torch.save(parts, arguments.cache)
    return tuple(part.float() for part in [*parts, None][:2] if part is not None)


def evaluate_seeds(
    features: torch.Tensor, views: list[str], unlabelled: torch.Tensor | None, copies: list, n_seeds: int
) -> dict:
    """Cross-validate with several seeds; return means and deviations, and the confusion summed over the seeds."""
    chances = [
        cross_validate(features, views, unlabelled, copies=copies, seed=seed)
        for seed in tqdm(range(n_seeds), desc="seeds")
    ]
    scores = [evaluate_views(part, views) for part in chances]
    numbers = {
        name: {
            "mean": float(np.mean([g[name] for g in scores])),
            "sd": float(np.std([g[name] for g in scores])),
            "of_each_seed": [round(g[name], 4) for g in scores],
        }
        for name in ("views", "keep")
    }
    confidence = choose_confidence(chances[0], views, wanted=0.99)
    return {
        **numbers,
        "confusion": np.sum([g["confusion"] for g in scores], axis=0).tolist(),
        "confidence_for_99": round(confidence, 4),
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", required=True, help="folder or zip of photos, with `view` in metadata.jsonl")
    parser.add_argument("--backbone", help="file of MobileNetV2 weights; none downloads torchvision's")
    parser.add_argument("--unlabelled", nargs="+", help="folders or zips of further photos, best in all views")
    parser.add_argument("--n_unlabelled", type=int, default=2000, help="photos of each of them, at most")
    parser.add_argument(
        "--not_squashed", action="store_true", help="the further photos have their own shape, not a squashed square's"
    )
    parser.add_argument("--size", type=int, default=224, help="columns of pixels that the backbone sees")
    parser.add_argument("--n_seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="file to keep the features in")
    parser.add_argument("--save", type=Path, help="folder for a classifier that is fitted to all labels")
    parser.add_argument("--out", type=Path, default=Path("data/records/views.json"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    pictures, views = read_labelled(arguments.views)
    copies = near_duplicates(hash_pictures(pictures), make_thumbnails(pictures))
    features, *unlabelled = read_features(arguments, pictures)
    record = {
        "n": len(views),
        "n_unlabelled": unlabelled[0].shape[1] if unlabelled else 0,
        "n_clusters_of_copies": len(copies),
        "n_folds": 5,
        "labels_only": evaluate_seeds(features, views, None, copies, arguments.n_seeds),
    }
    if unlabelled:
        record["with_unlabelled"] = evaluate_seeds(features, views, unlabelled[0], copies, arguments.n_seeds)
    record["seconds"] = round(time.perf_counter() - start)
    save_record(record, arguments.out)
    for name, value in record.items():
        print(f"{name}: {value}")
    if arguments.save:
        head = fit_view_head(features, views, unlabelled[0] if unlabelled else None)
        report = record["with_unlabelled" if unlabelled else "labels_only"]
        save_view_classifier(
            ViewClassifier(ViewFeatureExtractor(arguments.backbone, arguments.size), head), arguments.save, report
        )


if __name__ == "__main__":
    main()
