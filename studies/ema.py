"""Measure what the EMA of the generator is worth at the end of a run: held-out KID, with it and without.

    python studies/ema.py --run runs/common --heldout HELDOUT.zip --backbone MOBILENET.safetensors

The record is data/records/ema.json.
"""

import argparse
from pathlib import Path

from _record import save_record

from carproto.config import CarprotoError
from carproto.data.dataset import CarImages
from carproto.eval.features import feature_extractor
from carproto.eval.metrics import Evaluator
from carproto.gan.sngan import Generator, measure_statistics
from carproto.run import load_checkpoint

PARTS = {"ema": "G_ema", "raw": "G"}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--heldout", required=True, help="zip or folder of photos never trained on")
    parser.add_argument("--backbone", required=True, help="MobileNetV2 file")
    parser.add_argument("--n_fake", type=int, default=1000, help="cars to draw")
    parser.add_argument("--out", type=Path, default=Path("data/records"))
    arguments = parser.parse_args()
    state = load_checkpoint(arguments.run / "checkpoints")
    if state is None:
        raise CarprotoError(f"{arguments.run} holds no trained run: give a folder with checkpoints in it")
    config = state["config"]
    evaluator = Evaluator(
        CarImages(arguments.heldout, config["size"]).images,
        feature_extractor(arguments.backbone, size=96),
        n_fake=arguments.n_fake,
    )
    record = {"config": config, "step": state["step"]}
    for name, part in PARTS.items():
        G = Generator(config["size"], config["z_dim"], config["width"])
        G.load_state_dict(state[part])
        record[name] = evaluator.evaluate(measure_statistics(G))
        print(f"{name}: KID {record[name]['kid']:.3f}, coverage {record[name]['coverage']:.1%}")
    save_record(record, arguments.out / "ema.json")


if __name__ == "__main__":
    main()
