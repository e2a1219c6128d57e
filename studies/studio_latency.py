"""Measure how long the studio's first image of a new path takes: released toy pair, and 128 px at full width.

    python studies/studio_latency.py   # writes data/records/studio.json

The 128 px generators are untrained: their pictures are worthless, their time is that of trained ones. A browser adds
some 20 ms to each picture. Needs a quiet machine."""

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import torch
from _record import save_and_print

from carproto.app.pipeline import CarPipeline
from carproto.app.studio import IntensityStudio
from carproto.core import sample_latents
from carproto.gan.sngan import Generator, load_generator


async def time_paths(studio: IntensityStudio, n: int) -> list[float]:
    """Choose n further cars one after the other; return the milliseconds until each first picture was there."""
    taken = []
    for _ in range(n):
        before, start = studio.picture.value, time.perf_counter()
        studio.car_b.value = (studio.car_b.value + 1) % 16
        taken.append(1000 * (time.perf_counter() - start))
        assert studio.picture.value != before, "no new picture"
        studio.view.worker.job = None  # the rest of the path is not wanted here
        await asyncio.sleep(0.02)
    return taken


def open_pipeline(parts: tuple, size: int) -> IntensityStudio:
    """Open a studio on two generators, half way between the first two cars."""
    common, futuristic = (part.eval().requires_grad_(False) for part in parts)
    studio = IntensityStudio(CarPipeline(common, futuristic), sample_latents(16, common.z_dim, seed=0))
    studio.intensity.value = 0.5
    assert studio.path.content(0) and studio.path.images[0].shape[-1] == size
    return studio


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10, help="new paths, each time")
    parser.add_argument("--out", type=Path, default=Path("data/records/studio.json"))
    arguments = parser.parse_args()
    studios = {
        "toy64, released": open_pipeline(
            [load_generator(f"toy64/{part}", "cpu") for part in ("common", "futuristic")], 64
        ),
        "128 px, width 64, untrained": open_pipeline([Generator(128, 128, 64, seed=i) for i in (0, 1)], 128),
    }
    record = {"first_picture_ms": {name: {} for name in studios}}
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for name, studio in studios.items():
            asyncio.run(time_paths(studio, 2))  # warm up
            taken = asyncio.run(time_paths(studio, arguments.n))
            results = {"median": round(statistics.median(taken), 1), "slowest": round(max(taken), 1)}
            record["first_picture_ms"][name][f"{n_threads} thread" + "s" * (n_threads > 1)] = results
    save_and_print(record, arguments.out)


if __name__ == "__main__":
    main()
