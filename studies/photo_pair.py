"""Train the parent of the photo pair on aligned cars, in sittings that may end at any moment.

    python studies/photo_pair.py --data COMMON.zip --heldout HELDOUT.zip --masks FOLDER --aspect 1.4 \\
        --extractor MOBILENET.safetensors \\
        --feature_path SQUEEZENET.safetensors --run runs/photo64 --max_minutes 120

Heads on SqueezeNet's frozen features train beside the discriminator; MobileNetV2 at 96 px measures. One seed, since
the run is long. Where the run's folder is lost, `--milestone data/milestones/photo64` goes on from the committed
weights, with Adam's moments at zero."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from milestone import read_milestone  # noqa: E402

from carproto.config import CarprotoError, TrainConfig  # noqa: E402
from carproto.data.align import AlignConfig, frame_of  # noqa: E402
from carproto.data.dataset import CarImages  # noqa: E402
from carproto.data.masks import Aligner  # noqa: E402
from carproto.eval.features import mobilenet_extractor  # noqa: E402
from carproto.eval.metrics import Evaluator  # noqa: E402
from carproto.gan.train import train_gan  # noqa: E402

CONFIG = TrainConfig(
    size=64,
    width=24,
    z_dim=128,
    steps=60_000,
    batch=32,
    lr_g=4e-4,
    lr_d=1e-3,
    lr_f=4e-4,
    beta2=0.99,
    augment="translation,cutout",
    lecam_weight=0.0,
    feature_net="squeezenet1_1",
    report_every=1000,
)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="photos of common cars: folder or zip")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out ones")
    parser.add_argument(
        "--masks", type=Path, help="folder with a folder of masks for each set, by its name; default: beside the set"
    )
    parser.add_argument("--aspect", type=float, help="width by height of squashed photos; default: their own")
    parser.add_argument("--extractor", type=Path, required=True, help="MobileNetV2 weights, which measure")
    parser.add_argument("--feature_path", type=Path, help="SqueezeNet 1.1 weights, which train; default: torchvision's")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/photo64"), help="the run's folder; one that is there goes on"
    )
    parser.add_argument("--milestone", type=Path, help="weights to start a new run from")
    parser.add_argument("--max_minutes", type=float, help="stop cleanly after so long; default: never")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser.parse_args(argv)


def open_aligned(path: Path, arguments: argparse.Namespace) -> CarImages:
    """Open a set as aligned cars."""
    masks = arguments.masks / path.stem if arguments.masks else None
    return CarImages(path, CONFIG.size, align=Aligner(AlignConfig(aspect=arguments.aspect), masks=masks))


def main(argv: list[str] | None = None) -> None:
    """Train, or go on with a run."""
    arguments = read_arguments(argv)
    torch.set_num_threads(arguments.threads)
    cars, unseen = (open_aligned(path, arguments) for path in (arguments.data, arguments.heldout))
    evaluator = Evaluator(unseen.images, mobilenet_extractor(arguments.extractor, 96), n_fake=1000)
    about = {"data": arguments.data.name, "heldout": arguments.heldout.name, "frame": frame_of(cars.align.config)}
    if arguments.milestone:
        about["milestone"] = arguments.milestone.name
    parent = read_milestone(arguments.milestone) if arguments.milestone else None
    result = train_gan(
        cars.images,
        arguments.run,
        CONFIG,
        evaluate=evaluator.evaluate,
        heldout=unseen.images,
        parent=parent,
        about=about,
        max_minutes=arguments.max_minutes,
        feature_path=arguments.feature_path,
    )
    print(f"{arguments.run}: finished {result.finished}")


if __name__ == "__main__":
    try:
        main()
    except CarprotoError as error:
        sys.exit(f"photo_pair: {error}")
