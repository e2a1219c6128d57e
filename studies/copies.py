"""Measure copies of training cars by a pair of generators; the record holds distances and latents, no photo.

    python studies/copies.py toys
    python studies/copies.py photos --release PAIR --data COMMON.zip --heldout HELDOUT.zip --concepts CONCEPTS.zip \\
        --concepts_heldout CONCEPTS_HELDOUT.zip

For each generator: the copy rate, its limit, the distance ratios of generated and real cars, and the latents of the
lowest ratios. As a check of the measure, altered training cars (blurred, translated, brightened, mixed) take the
place of generated ones."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _record import save_record

from carproto.data.dataset import open_cars
from carproto.eval.metrics import (
    copy_descriptors,
    copy_rate,
    generate_images,
    nn_distance_ratio,
    reference_distance_ratio,
)
from carproto.gan.sngan import load_generator
from carproto.images import to_tensor

SPOILT = {
    "blurred": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "moved by 2 pixels": lambda x: torch.roll(x, (2, 2), (2, 3)),
    "brightened": lambda x: 0.8 * x + 0.2,
    "mixed with 30 % of another": lambda x: 0.7 * x + 0.3 * x.flip(0),
}
N_WORST = 8


def quantiles(values: torch.Tensor) -> list[float]:
    """Return 51 evenly spaced quantiles."""
    return torch.quantile(values, torch.linspace(0, 1, 51)).tolist()


def measure(
    name: str, train: torch.Tensor, heldout: torch.Tensor, n: int, seed: int, others: torch.Tensor | None = None
) -> dict:
    """Measure one generator; and `others`, photos of another source that are nobody's copies."""
    G = load_generator(name, "cpu")
    small_train, small_heldout = copy_descriptors(train), copy_descriptors(heldout)
    generated = copy_descriptors(generate_images(G, n, seed=seed))
    reference = reference_distance_ratio(small_train, small_heldout)
    distance_ratio = nn_distance_ratio(generated, small_train, small_heldout)
    nearest, limit = torch.cdist(generated, small_train).min(1).values, torch.quantile(reference, 0.01)
    worst = [
        {"latent": i, "distance_ratio": distance_ratio[i].item(), "distance": nearest[i].item()}
        for i in distance_ratio.argsort()[:N_WORST].tolist()
    ]
    some = to_tensor(train[torch.linspace(0, len(train) - 1, min(len(train), 1000)).long()])
    results = {
        how: copy_rate(copy_descriptors(spoil(some).clamp(-1, 1)), small_train, small_heldout)
        for how, spoil in SPOILT.items()
    }
    return {
        "fingerprint": G.fingerprint(),
        "n_train": len(train),
        "n_heldout": len(heldout),
        "n_generated": n,
        "n_reference": len(reference),
        "copy_rate": copy_rate(generated, small_train, small_heldout),
        "limit": limit.item(),
        "real": quantiles(reference),
        "generated": quantiles(distance_ratio),
        "worst": worst,
        "distance_generated": quantiles(nearest),
        "distance_heldout": quantiles(torch.cdist(small_heldout, small_train).min(1).values),
        "altered_copies_found": results,
        "others_called_copies": None
        if others is None
        else copy_rate(copy_descriptors(others), small_train, small_heldout),
    }


def main() -> None:
    """Write data/records/copies_NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("toys", "photos"))
    parser.add_argument("--release", default="toy64", help="name or folder of the pair; for photos, one of raw photos")
    for option in ("data", "heldout", "concepts", "concepts_heldout"):
        parser.add_argument(f"--{option}", help="for photos: zip or folder")
    parser.add_argument("--n", type=int, default=4000, help="generated cars")
    parser.add_argument("--seed", type=int, default=0, help="of their latents")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args()
    if arguments.name == "toys":
        sets = {
            part: [open_cars(data, 64, split=split).images for split in ("train", "heldout")]
            for part, data in (("common", "toycars"), ("futuristic", "toycars-futuristic"))
        }
    else:
        paths = {
            "common": (arguments.data, arguments.heldout),
            "futuristic": (arguments.concepts, arguments.concepts_heldout),
        }
        if None in (*paths["common"], *paths["futuristic"]):
            parser.error("photos need --data, --heldout, --concepts and --concepts_heldout")
        sets = {part: [open_cars(path, 64, split=None).images for path in both] for part, both in paths.items()}
    others = {"futuristic": sets["common"][1]}
    results = {
        part: measure(f"{arguments.release}/{part}", *both, arguments.n, arguments.seed, others.get(part))
        for part, both in sets.items()
    }
    path = save_record({"seed": arguments.seed, **results}, arguments.out / f"copies_{arguments.name}.json")
    for part, numbers in results.items():
        altered = ", ".join(f"{how} {share:.0%}" for how, share in numbers["altered_copies_found"].items())
        print(
            f"{part}: copy rate {numbers['copy_rate']:.2%} of {arguments.n}, limit {numbers['limit']:.2f}; "
            f"copies found: {altered}"
        )
    print(path)


if __name__ == "__main__":
    main()
