"""Train photo pairs on aligned cars in four stages, each in sittings that may end at any moment; prepare a release.

    python studies/photo_pair.py parent --data COMMON.zip --heldout HELDOUT.zip --run runs/parent64 OPTIONS
    python studies/photo_pair.py joint --data COMMON.zip --heldout HELDOUT.zip --run runs/photo64 \\
        --source runs/parent64 OPTIONS
    python studies/photo_pair.py child --data CONCEPTS.zip --heldout CONCEPTS_HELDOUT.zip --run runs/photo64_child \\
        --source runs/photo64 OPTIONS
    python studies/photo_pair.py encoder --data COMMON.zip --heldout HELDOUT.zip --run runs/photo64_encoder \\
        --source runs/photo64 --child runs/photo64_child --concepts CONCEPTS.zip --steps 5000 OPTIONS
    python studies/photo_pair.py release --data COMMON.zip --heldout HELDOUT.zip --run runs/photo64_encoder OPTIONS \\
        --concepts CONCEPTS.zip --concepts_heldout CONCEPTS_HELDOUT.zip
    python tools/release.py photo64 --common runs/photo64 --futuristic runs/photo64_child \\
        --encoder runs/photo64_encoder --probe runs/photo64_encoder/probe

OPTIONS: --masks FOLDER --aspect 1.4 --extractor MOBILENET.safetensors --feature_path SQUEEZENET.safetensors. The parent
is an SN-GAN with heads on SqueezeNet's frozen features; then generator and encoder are tuned jointly; the child is
fine-tuned with FreezeD; the encoder alone goes on, with both generators. MobileNetV2 at 96 px measures. One seed, since
the runs are long.
Where a source's folder is lost, `--source data/milestones/photo128` goes on from the committed weights, with Adam's
moments at zero. A joint run with `--size 128` whose source has 64 px grows the source's networks first, and all later
stages take `--size 128`."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _record import run_or_exit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from milestone import read_milestone  # noqa: E402

from carproto.config import CarprotoError, FinetuneConfig, JointConfig, TrainConfig  # noqa: E402
from carproto.data.align import AlignConfig, describe_frame  # noqa: E402
from carproto.data.dataset import CarImages  # noqa: E402
from carproto.data.masks import Aligner  # noqa: E402
from carproto.eval.features import mobilenet_extractor  # noqa: E402
from carproto.eval.futurism import (  # noqa: E402
    ENCODER,
    GREY_ENCODER,
    FuturismProbe,
    encoder_features,
    fit_futurism_probe,
)
from carproto.eval.metrics import Evaluator  # noqa: E402
from carproto.files import load_json  # noqa: E402
from carproto.gan.finetune import finetune_freezed  # noqa: E402
from carproto.gan.grow import grow_config, grow_parent  # noqa: E402
from carproto.gan.sngan import Generator, load_generator  # noqa: E402
from carproto.gan.train import find_generator, train_gan  # noqa: E402
from carproto.latent.encoder import LatentEncoder, evaluate_encoder, load_encoder, save_encoder  # noqa: E402
from carproto.latent.joint import ChildCars, tune_jointly  # noqa: E402
from carproto.run import RunFolder, load_checkpoint  # noqa: E402

CONFIG = TrainConfig(
    size=64,
    width=24,
    z_dim=128,
    steps=60_000,
    batch=32,
    lr_g=2e-4,
    lr_d=1e-3,
    lr_f=4e-4,
    beta2=0.99,
    augment="translation,cutout",
    lecam_weight=0.0,
    feature_net="squeezenet1_1",
    report_every=1000,
)
JOINT = JointConfig(**{**asdict(CONFIG), "report_every": 500})
ENCODER_ALONE = {
    "fixed_generator": True,
    "lr_e": 2e-4,
    "decay_share": 0.5,
    "pixel_weight": 50.0,
    "perceptual_weight": 60.0,
    "channel_gain_weight": 0.02,
    "recolour": True,
}
CHILD = FinetuneConfig(n_frozen=2, steps=1000, augment="color,translation,cutout", lecam_weight=0.0, report_every=250)

GROW_STEPS = 800  # of fitting new layers; those of photo128's discriminator had 300


def config_at(size: int, stage: str) -> JointConfig:
    """Return the options of a joint run, or of its encoder alone."""
    config = JOINT if size == JOINT.size else replace(grow_config(JOINT), report_every=400)
    return replace(config, **ENCODER_ALONE) if stage == "encoder" else config


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("parent", "joint", "encoder", "child", "release"), help="what to do")
    parser.add_argument("--data", type=Path, required=True, help="photos: folder or zip")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out ones")
    parser.add_argument(
        "--masks", type=Path, help="folder with a folder of masks for each set, by its name; default: beside the set"
    )
    parser.add_argument("--aspect", type=float, help="width by height of squashed photos; default: their own")
    parser.add_argument("--size", type=int, choices=(64, 128), default=64, help="side of the images, pixels")
    parser.add_argument("--extractor", type=Path, required=True, help="MobileNetV2 weights, which measure")
    parser.add_argument("--feature_path", type=Path, help="SqueezeNet 1.1 weights, which train; default: torchvision's")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/photo64"), help="the run's folder; one that is there goes on"
    )
    parser.add_argument("--source", type=Path, help="run or milestone that a new run starts from; a parent needs none")
    parser.add_argument("--steps", type=int, help="of a joint run, or of an encoder alone; default: 60,000")
    parser.add_argument("--generator", type=Path, help="run or folder of the parent as released, for an encoder alone")
    parser.add_argument("--child", type=Path, help="run or folder of the child that an encoder inverts too")
    parser.add_argument("--concepts", type=Path, help="futuristic cars, for the encoder, and the probe of a release")
    parser.add_argument("--concepts_heldout", type=Path, help="held-out ones")
    parser.add_argument("--max_minutes", type=float, help="stop cleanly after so long; default: never")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser.parse_args(argv)


def open_aligned(path: Path, arguments: argparse.Namespace, size: int) -> CarImages:
    """Open a set as aligned cars of a size."""
    masks = arguments.masks / path.stem if arguments.masks else None
    return CarImages(path, size, align=Aligner(AlignConfig(aspect=arguments.aspect), masks=masks))


def open_generator(path: Path) -> Generator:
    """Open the generator of a run, or of a folder of weights."""
    return load_generator(path if (path / "model.safetensors").is_file() else find_generator(path), "cpu")


def open_child(arguments: argparse.Namespace) -> ChildCars:
    """Open the child of a run, or from a folder of weights, and the photos that it learned from."""
    if arguments.concepts is None:
        raise CarprotoError("an encoder inverts a child's cars with their photos: name --concepts")
    concepts = open_aligned(arguments.concepts, arguments, arguments.size).images
    return ChildCars(concepts, open_generator(arguments.child))


def load_source(source: Path | None, stage: str) -> dict | None:
    """Load the newest checkpoint of a run, or a milestone's weights."""
    if source is None:
        if stage in ("joint", "encoder"):
            raise CarprotoError("joint tuning starts from a trained parent: name its run, or a milestone (--source)")
        return None
    state = load_checkpoint(source / "checkpoints")
    return state if state is not None else read_milestone(source)


def measure_probe(probe: FuturismProbe, features: list[torch.Tensor], images: list[torch.Tensor]) -> dict:
    """Measure a probe on held-out common and concept cars: how well it tells them apart, and how it follows paint."""
    logits = [probe.logit(some) for some in features]
    saturation = [(x.amax(1) - x.amin(1)).float().mean((1, 2)) for x in images]  # of the mean pixel, 0 to 255
    kinds = ("common", "concept")
    return {
        "heldout_logit": {kind: [x.mean().item(), x.std().item()] for kind, x in zip(kinds, logits)},
        "heldout_auc": (logits[1][:, None] > logits[0]).float().mean().item(),
        "n_heldout": [len(x) for x in logits],
        "saturation_correlation": {
            kind: torch.corrcoef(torch.stack(pair))[0, 1].item() for kind, pair in zip(kinds, zip(logits, saturation))
        },
    }


def fit_probe(E: LatentEncoder, sets: list[torch.Tensor]) -> FuturismProbe:
    """Fit a futurism probe to grey copies of common and concept cars; report how it does on unseen sets of both.

    A probe that sees colours is fitted and measured too, for comparison."""
    reports = {}
    for name in (ENCODER, GREY_ENCODER):
        features = [encoder_features(E, images, grey=name == GREY_ENCODER) for images in sets]
        probe = fit_futurism_probe(*features[:2], extractor=name)
        reports[name] = measure_probe(probe, features[2:], sets[2:])
    probe.report |= {**reports[GREY_ENCODER], "in_colour": reports[ENCODER]}
    return probe


def prepare_release(arguments: argparse.Namespace, cars: CarImages, unseen: CarImages) -> None:
    """Evaluate a joint run's encoder, and fit a futurism probe to its features."""
    if arguments.concepts is None or arguments.concepts_heldout is None:
        raise CarprotoError("a futurism probe needs futuristic cars: name --concepts and --concepts_heldout")
    source = arguments.run / "final"
    G = load_generator(source, "cpu")
    E = load_encoder(source / "encoder", fingerprint=G.fingerprint(), device="cpu")
    scores = evaluate_encoder(E, [G], heldout=[unseen.images])
    save_encoder(E, arguments.run / "encoder", about={**scores, "steps": load_json(source / "config.json")["steps"]})
    packs = (arguments.concepts, arguments.concepts_heldout)
    concepts, unseen_concepts = (open_aligned(path, arguments, arguments.size) for path in packs)
    probe = fit_probe(E, [some.images for some in (cars, concepts, unseen, unseen_concepts)])
    probe.save(arguments.run / "probe")
    auc = probe.report["heldout_auc"]
    print(f"photo R2 {scores['photo_r2']:.3f}; futurism of held-out cars: AUC {auc:.3f}")


def main(argv: list[str] | None = None) -> None:
    """Train a stage, or go on with its run."""
    arguments = read_arguments(argv)
    torch.set_num_threads(arguments.threads)
    cars, unseen = (open_aligned(path, arguments, arguments.size) for path in (arguments.data, arguments.heldout))
    if arguments.stage == "release":
        prepare_release(arguments, cars, unseen)
        return
    evaluator = Evaluator(unseen.images, mobilenet_extractor(arguments.extractor, 96), n_fake=1000)
    about = {"data": arguments.data.name, "heldout": arguments.heldout.name, "frame": describe_frame(cars.align.config)}
    options = {
        "evaluate": evaluator.evaluate,
        "heldout": unseen.images,
        "about": about,
        "max_minutes": arguments.max_minutes,
        "feature_path": arguments.feature_path,
    }
    if arguments.stage == "child":
        if arguments.source is None:
            raise CarprotoError("the child starts from a tuned parent: name its run (--source)")
        result = finetune_freezed(arguments.source, cars.images, arguments.run, **CHILD.changes(), **options)
    elif arguments.stage in ("joint", "encoder"):
        config, source, run = config_at(arguments.size, arguments.stage), None, RunFolder(arguments.run)
        config = replace(config, steps=arguments.steps or config.steps)
        if config.fixed_generator:
            options["evaluate"] = None  # its samples stay the same
        if config.fixed_generator and arguments.child:
            options["child"] = open_child(arguments)
        if config.fixed_generator and arguments.generator:
            options["generator"] = open_generator(arguments.generator)
        if load_checkpoint(run.checkpoints) is not None:
            stored = run.config()
            config = replace(config, grow_steps=stored.get("grow_steps", 0), encoder_side=stored.get("encoder_side"))
        else:
            source = load_source(arguments.source, arguments.stage)
            if source["config"]["size"] < config.size:
                source = grow_parent(source, cars.images, steps=GROW_STEPS)
                about["growth"] = source["growth"]
            else:
                config = replace(config, grow_steps=0, encoder_side=source["config"].get("encoder_side"))
        result = tune_jointly(cars.images, arguments.run, config, parent=source, **options)
    else:
        source = load_source(arguments.source, arguments.stage)
        result = train_gan(cars.images, arguments.run, CONFIG, parent=source, **options)
    print(f"{arguments.run}: finished {result.finished}")


if __name__ == "__main__":
    run_or_exit(main)
