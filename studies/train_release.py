"""Train a pair of generators and their encoder on photos, from nothing to a release; resumes when stopped.

    python studies/train_release.py raw64 --data COMMON.zip --heldout HELDOUT.zip --concepts CONCEPTS.zip \\
        --concepts_heldout CONCEPTS_HELDOUT.zip --backbone MOBILENET.safetensors  # 64 px, two hours on a CPU
    python studies/train_release.py raw128 ... --size 128 --width 64 --batch 128 --d_steps 2 --beta2 0.99 \\
        --steps 30000 40000 5000 6000  # a GPU

In order: train on common cars, shorten the code to the directions that show and let it settle, fine-tune on concept
cars, shorten both codes alike, train the encoder, measure, release. Each stage is the sub-command of its name, its
run lies in runs/NAME, and goes on where it was stopped. The release, data/NAME, gets fp16 weights and the
records; no network is needed."""

import argparse
import sys
import time
from pathlib import Path

from _record import run_or_exit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import release  # noqa: E402

from carproto.app import commands, latent_commands
from carproto.app.options import Evaluate, TrainEncoder
from carproto.app.training_options import Finetune, Subspace, Train
from carproto.config import CarprotoError, EncoderConfig, FinetuneConfig, TrainConfig
from carproto.files import load_json
from carproto.run import RunFolder


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the release, such as raw64")
    sources = {
        "data": "photos of common cars",
        "heldout": "held-out ones",
        "concepts": "photos of concept cars",
        "concepts_heldout": "held-out ones",
    }
    for option, what in sources.items():
        parser.add_argument(f"--{option}", required=True, help=f"{what}: zip or folder")
    parser.add_argument("--backbone", required=True, help="who measures: a MobileNetV2 file, inception, or toys")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=4,
        default=(4000, 5500, 1000, 1200),
        metavar=("FIRST", "COMMON", "CONCEPT", "ENCODER"),
        help="until the common cars' code is shortened, in all, of the child, of the encoder",
    )
    parser.add_argument("--max_minutes", type=float, default=None, help="stop cleanly after so long; without it never")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="channels at full size; 64 is the published network")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--d_steps", type=int, default=1)
    parser.add_argument("--beta2", type=float, default=0.9, help="Adam's second decay in the common cars' training")
    parser.add_argument(
        "--augment", default="translation", help="for the many common cars; the few concept cars get all of DiffAugment"
    )
    parser.add_argument(
        "--n_frozen", type=int, default=2, help="lower blocks of the discriminator that the child keeps"
    )
    parser.add_argument(
        "--z_dims",
        type=int,
        nargs=3,
        default=(64, 16, 8),
        metavar=("FIRST", "SETTLED", "LAST"),
        help="numbers of a latent, over time",
    )
    parser.add_argument(
        "--report_every", type=int, default=500, help="steps between measurements; the child's are twice as dense"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path("data"), help="where the release goes")
    return parser.parse_args(argv)


class Stages:
    """The stages, each in its folder; all can be called again."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.folder, self.start = arguments, arguments.runs / arguments.name, time.monotonic()
        self.evaluated = {
            "extractor": arguments.backbone,
            "extractor_size": 96 if arguments.backbone.endswith(".safetensors") else None,
        }

    def path(self, stage: str) -> str:
        """Say where a stage's run lies."""
        return str(self.folder / stage)

    def minutes_left(self) -> float | None:
        """Say for how long the next stage may run; None means for ever."""
        if self.arguments.max_minutes is None:
            return None
        left = self.arguments.max_minutes - (time.monotonic() - self.start) / 60
        if left <= 0:
            raise CarprotoError(f"{self.arguments.max_minutes:g} minutes are over; the same command goes on")
        return left

    def check_done(self, stage: str, weights: str, steps: int) -> None:
        """Stop here, to be called again, unless a stage has all its steps."""
        done = load_json(self.folder / stage / weights / "config.json")["steps"]
        if done < steps:
            raise CarprotoError(f"stopped in {stage} after step {done} of {steps}; the same command goes on")

    def train(self, stage: str, z_dim: int, steps: int) -> None:
        """Train on common cars."""
        arguments = self.arguments
        config = TrainConfig(
            size=arguments.size,
            width=arguments.width,
            z_dim=z_dim,
            steps=steps,
            batch=arguments.batch,
            d_steps=arguments.d_steps,
            beta2=arguments.beta2,
            augment=arguments.augment,
            report_every=arguments.report_every,
            seed=arguments.seed,
        )
        run = {"run": self.path(stage), "allow_changes": True, "max_minutes": self.minutes_left()}
        commands.train(Train(arguments.data, heldout=arguments.heldout, config=config, **run, **self.evaluated))
        self.check_done(stage, "final", steps)

    def finetune(self, stage: str, source: str, steps: int) -> None:
        """Fine-tune on concept cars."""
        arguments = self.arguments
        config = FinetuneConfig(
            n_frozen=arguments.n_frozen,
            steps=steps,
            report_every=max(arguments.report_every // 2, 1),
            seed=arguments.seed,
        )
        run = {"run": self.path(stage), "max_minutes": self.minutes_left()}
        commands.finetune(
            Finetune(
                self.path(source),
                arguments.concepts,
                heldout=arguments.concepts_heldout,
                config=config,
                **run,
                **self.evaluated,
            )
        )
        self.check_done(stage, "final", steps)

    def shorten(self, stage: str, source: str, z_dim: int, like: str | None = None) -> None:
        """Restrict a run's latent to a subspace, unless that was done."""
        if not RunFolder(self.folder / stage).exists:
            commands.subspace(Subspace(self.path(source), self.path(stage), z_dim, like and self.path(like)))

    def train_encoder(self, stage: str, common: str, futuristic: str, steps: int) -> None:
        """Train the encoder of the pair."""
        arguments = self.arguments
        photos = {
            "data": arguments.data,
            "heldout": arguments.heldout,
            "concepts": arguments.concepts,
            "heldout_concepts": arguments.concepts_heldout,
        }
        config = EncoderConfig(width=32, steps=steps, seed=arguments.seed)
        run = {"run": self.path(stage), "max_minutes": self.minutes_left()}
        options = TrainEncoder(self.path(common), self.path(futuristic), config=config, **photos, **run)
        latent_commands.train_encoder(options)
        self.check_done(stage, "encoder", steps)

    def measure(self, stage: str, heldout: str, train: str) -> None:
        """Measure a generator on a thousand generated cars, unless that was done."""
        if not (self.folder / stage / "evaluation.json").exists():
            commands.evaluate(Evaluate(self.path(stage), heldout, train=train, n_fake=1000, **self.evaluated))

    def run(self) -> None:
        """Go through all stages."""
        arguments, (first, settled, last) = self.arguments, self.arguments.z_dims
        n_first, n_common, n_concept, n_encoder = arguments.steps
        self.train("common_first", first, n_first)
        self.shorten("common_settled", "common_first", settled)
        self.train("common_settled", settled, n_common)
        self.finetune("futuristic_settled", "common_settled", n_concept)
        self.shorten("common", "common_settled", last)
        self.shorten("futuristic", "futuristic_settled", last, like="common")
        self.train_encoder("encoder", "common", "futuristic", n_encoder)
        self.measure("common", arguments.heldout, arguments.data)
        self.measure("futuristic", arguments.concepts_heldout, arguments.concepts)
        parts = [word for part in ("common", "futuristic", "encoder") for word in (f"--{part}", self.path(part))]
        release.main([arguments.name, *parts, "--data", str(arguments.out)])


def main(argv: list[str] | None = None) -> None:
    """Train and release; exit with one line for a mistake."""
    run_or_exit(Stages(read_arguments(argv)).run)


if __name__ == "__main__":
    main()
