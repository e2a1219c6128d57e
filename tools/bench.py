"""Time what carproto spends its time on, on this machine: drawing toy cars, and the two networks forward and backward.

    python tools/bench.py                  # 32 and 64 px
    python tools/bench.py --sizes 128
"""
import argparse
import statistics
import time

import torch
from tqdm import tqdm

from carproto.core import describe_environment, draw_latents, pick_device, pick_precision
from carproto.sngan import Discriminator, Generator
from carproto.toycars import ToyCars

BATCH = 32


def time_call(call, device: torch.device, seconds: float = 3) -> float:
    """Return the median time of a call in seconds, after one call to warm up."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def make_jobs(size: int, device: torch.device) -> dict:
    """Return the jobs for one size; each handles BATCH images."""
    precision = pick_precision(device)
    G, D = Generator(size).to(device), Discriminator(size).to(device)
    z = draw_latents(BATCH, G.z_dim).to(device)
    real = torch.rand(BATCH, 3, size, size, device=device) * 2 - 1

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def draw():
        G.eval()
        with torch.no_grad(), autocast():
            G(z)

    def judge_and_learn():
        with autocast():
            loss = D(real).float().mean()
        loss.backward()

    def draw_and_learn():
        G.train()
        with autocast():
            loss = D(G(z)).float().mean()
        loss.backward()

    return {
        "toy cars drawn": lambda: ToyCars(BATCH, size),
        "G forward": draw,
        "D forward and backward": judge_and_learn,
        "G and D forward and backward": draw_and_learn,
    }


def main() -> None:
    """Print images per second for each job and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides in pixels")
    sizes = parser.parse_args().sizes
    device = pick_device()
    machine = describe_environment()
    print(f"{machine['gpu'] or machine['processor']}, {machine['n_threads']} threads, torch {machine['torch']}, {pick_precision(device)}")
    rows = []
    for size in sizes:
        for name, job in tqdm(make_jobs(size, device).items(), desc=f"{size} px", unit="job"):
            rows.append((size, name, BATCH / time_call(job, device)))
    print(f"{'size':>4}  {'job':<30}{'images/s':>10}")
    for size, name, rate in rows:
        print(f"{size:>4}  {name:<30}{rate:>10.1f}")


if __name__ == "__main__":
    main()
