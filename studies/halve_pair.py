"""Halve a released pair of generators and their encoder: the same latents, images of half the size.

    python studies/halve_pair.py photo128 --data COMMON.zip --concepts CONCEPTS.zip --aspect 1.4 --masks FOLDER \\
        --discriminator data/photo64/common/discriminator --out runs/half

Both generators are fitted to the larger ones' images of random latents, and of training photos that the larger encoder
inverts, of both kinds in both generators: a blend takes a common car through the child too. Weights are stored as int8,
as a release does, so that the encoder goes on from the generators that are released:

    python studies/photo_pair.py encoder --source runs/half/milestone --generator runs/half/common \\
        --child runs/half/futuristic ...

The discriminator, whose features refinement compares, is another training's at half the size."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _record import describe_command, run_or_exit
from photo_pair import JOINT, open_aligned
from tqdm import tqdm

from carproto.config import CarprotoError
from carproto.core import progress, seeded
from carproto.data.align import AlignConfig, describe_frame
from carproto.files import save_json
from carproto.gan.grow import halve_generator
from carproto.gan.sngan import Generator, load_generator, read_discriminator, save_discriminator, save_generator
from carproto.images import to_tensor
from carproto.latent.encoder import StyleEncoder, halve_encoder, load_encoder, save_encoder
from carproto.run import describe_environment
from carproto.weights import save_weights

KINDS = ("common", "futuristic")


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="pair to halve, such as photo128")
    parser.add_argument("--data", type=Path, required=True, help="common training photos: folder or zip")
    parser.add_argument("--concepts", type=Path, required=True, help="futuristic training photos")
    parser.add_argument("--masks", type=Path, help="folder with a folder of masks for each set; default: beside it")
    parser.add_argument("--aspect", type=float, help="width by height of squashed photos; default: their own")
    parser.add_argument("--discriminator", required=True, help="folder of one at half the size")
    parser.add_argument("--steps", type=int, default=3000, help="of either generator")
    parser.add_argument("--n_photos", type=int, default=1500, help="common photos that are inverted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--out", type=Path, required=True, help="folder of the halved pair, made anew")
    return parser.parse_args(argv)


@torch.no_grad()
def invert(images: torch.Tensor, E: StyleEncoder, G: Generator, kind: str) -> list[torch.Tensor]:
    """Return latents and channel gains of photos, by the encoder alone."""
    codes = []
    with progress(len(images), f"encode {kind}", unit="photo") as bar:
        for part in images.split(32):
            codes.append(E.encode(to_tensor(part), G))
            bar.update(len(part))
    return [torch.cat(parts) for parts in zip(*codes)]


def halve_pair(arguments: argparse.Namespace) -> dict:
    """Halve both generators and their encoder, save all, and return what was measured."""
    pair = {kind: load_generator(f"{arguments.release}/{kind}", "cpu") for kind in KINDS}
    G = pair["common"]
    E = load_encoder(f"{arguments.release}/encoder", fingerprint=G.fingerprint(), device="cpu")
    D = read_discriminator(arguments.discriminator, "cpu")
    if 2 * D.size != G.size:
        raise CarprotoError(f"{arguments.discriminator} takes {D.size} px, not {G.size // 2}: name another one")
    for net in (*pair.values(), E):
        net.to(memory_format=torch.channels_last)
    cars, concepts = (open_aligned(path, arguments, G.size) for path in (arguments.data, arguments.concepts))
    some = torch.randperm(len(cars.images), generator=seeded(arguments.seed))[: arguments.n_photos]
    sets = (cars.images[some], concepts.images)
    codes = [invert(x, E, pair[kind], kind) for x, kind in zip(sets, KINDS)]
    inversions = tuple(torch.cat(parts) for parts in zip(*codes))
    frame = {"frame": describe_frame(AlignConfig(aspect=arguments.aspect))}
    about = {"command": describe_command(), "release": arguments.release, "n_inversions": len(inversions[0]), **frame}
    halves, errors, options = [], {}, {"inversions": inversions, "steps": arguments.steps, "seed": arguments.seed}
    for kind, whole in pair.items():
        start = time.monotonic()
        parent = (G, halves[0]) if halves else None
        with tqdm(total=arguments.steps, desc=f"halve {kind}", unit="step") as bar:
            half, error = halve_generator(whole, parent=parent, progress=bar, **options)
        folder = arguments.out / kind
        save_generator(half, folder / "final", precision="int8", about={"steps": arguments.steps, **frame})
        halves.append(load_generator(folder / "final", "cpu"))
        errors[kind] = {"mse": error, "seconds": round(time.monotonic() - start)}
        save_json({**about, **errors[kind]}, folder / "data.json")
        save_json(describe_environment(), folder / "env.json")
    half = halves[0]
    save_discriminator(D, arguments.out / "common" / "discriminator")
    smaller = halve_encoder(E, half)
    save_encoder(smaller, arguments.out / "common" / "final" / "encoder")
    save_parent(arguments.out / "milestone", half, D, smaller)
    return {**errors, "n_inversions": len(inversions[0])}


def save_parent(folder: Path, G: Generator, D: torch.nn.Module, E: StyleEncoder) -> None:
    """Write what `photo_pair.py encoder` starts from."""
    parts = {"G": G, "G_ema": G, "D": D, "E_ema": E}
    states = {part: net.state_dict() for part, net in parts.items()}
    tensors = {f"{part}.{name}": value.clone() for part, state in states.items() for name, value in state.items()}
    config = asdict(JOINT) | G.config() | {"encoder_width": E.width, "encoder_side": E.side}
    save_weights(tensors, folder, {"kind": "milestone", "step": 0, "config": config})


def main(argv: list[str] | None = None) -> None:
    """Halve a pair."""
    arguments = read_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.out.exists():
        raise CarprotoError(f"{arguments.out} exists: name a new folder, or remove it")
    measured = halve_pair(arguments)
    for name, value in measured.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    run_or_exit(main)
