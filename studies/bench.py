"""Time two steps of D and one of G, in turns: torch-mimicry's SN-GAN, our networks unfused, and fused.

    make bench                       # 32, 64 and 128 px on the device at hand, 8 minutes on two cores
    make bench ARGS="--device cuda --batch 128 --sizes 128"   # the full recipe on a GPU
    make bench ARGS="--sizes 64:32 --peers plain ours"        # 64 px with 32 channels, two peers

Each peer lives in a process of its own and waits while another has its turn, so that all see the same machine: its
load, its clock. Ratios are taken within a round of turns. `ours` does the work that the others do; `ours, full
recipe` adds DiffAugment and LeCam; `ours compiled`, timed only when named, goes through torch.compile."""

import argparse
import math
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from _record import run_or_exit
from bench_peers import D_STEPS, MATRIX, PEERS, Absent, Peer, Work
from tqdm import tqdm

from carproto.config import CarprotoError, check_size
from carproto.core import pick_device, pick_precision
from carproto.files import save_json
from carproto.run import describe_environment

COMPILED = "ours compiled"
LEGEND = """
GFLOP: what the plain form of a peer's networks needs for two steps of D and one of G; a matrix product, for one.
seconds: for the same, median of the rounds. photos/s: photos that D saw. memory: {memory}, at its peak.
x: how many times as fast as the other, in the same round.
TFLOP/s: GFLOP by seconds; share: of the matrix product's rate."""
N_WARM_UP = {"cpu": 1, "cuda": 10}


class Child:
    """A process that holds one peer, and steps when told."""

    def __init__(self, name: str, work: Work, n_threads: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["carproto.gan.trainer"]
        )  # imported once, computed with never: each child starts in no time
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, name, work, n_threads))
        self.process.start()
        far_end.close()

    def hear(self) -> dict:
        """Wait for an answer."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return {
                "failed": f"its process ended with {self.process.exitcode}; -9 means that memory ran out: lower --batch"
            }

    def take_turn(self, seconds: float) -> dict:
        """Let it step for at least so long, and once at least."""
        with suppress(OSError):
            self.connection.send(seconds)
        return self.hear()

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def serve(connection, name: str, work: Work, n_threads: int) -> None:
    """Build a peer, warm it up, and time its steps for each message until there are no more; this runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(n_threads)
    try:
        empty = measure_peak(work.device)
        peer = PEERS[name](work)
        time_steps(peer, work.device, n_at_least=N_WARM_UP[torch.device(work.device).type])
        connection.send(
            {
                "precision": peer.precision,
                "parameters": peer.parameters,
                "tflop": peer.flop / 1e12,
                "empty_mb": empty / 1e6,
            }
        )
        while True:
            seconds = time_steps(peer, work.device, connection.recv())
            connection.send({"seconds": seconds, "memory_mb": measure_peak(work.device) / 1e6})
    except (EOFError, BrokenPipeError):
        return
    except Absent as error:
        connection.send({"absent": str(error)})
    except Exception as error:
        connection.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]})


def time_steps(peer: Peer, device: str, seconds: float = 0, n_at_least: int = 1) -> float:
    """Return the mean seconds of a step over at least so many seconds and steps."""
    if torch.device(device).type == "cuda":
        return time_steps_on_gpu(peer, seconds, n_at_least)
    n, start = 0, time.perf_counter()
    while n < n_at_least or time.perf_counter() - start < seconds:
        peer.step()
        n += 1
    return (time.perf_counter() - start) / n


def time_steps_on_gpu(peer: Peer, seconds: float, n_at_least: int) -> float:
    """Time queued steps: fix their number first, wait once at the end, free the memory for the next peer."""

    def time_some(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            peer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    time_some(1)
    results = time_some(max(n_at_least, math.ceil(seconds / time_some(1))))
    torch.cuda.empty_cache()
    return results


def measure_peak(device: str) -> float:
    """Return the most memory that this process has held so far, in bytes: the GPU's, or the whole process's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_turns(
    names: list[str], work: Work, n_rounds: int, seconds: float, n_threads: int, bar: tqdm
) -> dict[str, dict]:
    """Let the peers take turns; return for each what it is and its turns, or why there are none."""
    children, results = {}, {}
    title = f"{work.size} px, width {work.width}"
    try:
        for name in names:
            bar.set_description(f"{title}: starting {name}")
            children[name] = Child(name, work, n_threads)
            results[name] = {**children[name].hear(), "turns": []}
            bar.update()
        for number in range(n_rounds):
            for name in names:
                bar.set_description(f"{title}, round {number + 1} of {n_rounds}: {name}")
                if not {"failed", "absent"} & results[name].keys():
                    answer = children[name].take_turn(seconds)
                    if "failed" in answer:
                        results[name] |= answer
                    else:
                        results[name]["turns"].append(answer)
                bar.update()
    finally:
        for child in children.values():
            child.stop()
    return results


def summarise(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def make_rows(results: dict[str, dict], work: Work) -> list[dict]:
    """Return the record of one size: a row for each peer that finished."""
    seconds = {
        name: [turn["seconds"] for turn in peer["turns"]]
        for name, peer in results.items()
        if "failed" not in peer and peer["turns"]
    }
    rates = [results[MATRIX]["tflop"] / s for s in seconds.get(MATRIX, [])]
    rows = []
    for name, times in seconds.items():
        peer = results[name]
        row = {
            "size": work.size,
            "width": work.width,
            "batch": work.batch,
            "peer": name,
            "precision": peer["precision"],
            "tflop": peer["tflop"],
        }
        row |= {
            "seconds": summarise(times),
            "seconds_of_rounds": times,
            "tflop_per_second": peer["tflop"] / statistics.median(times),
        }
        if name != MATRIX:
            row["parameters_g"], row["parameters_d"] = peer["parameters"]
            row["steps_per_second"] = 1 / statistics.median(times)
            row["images_per_second"] = D_STEPS * work.batch * row["steps_per_second"]
            row["memory_mb"], row["memory_when_empty_mb"] = peer["turns"][-1]["memory_mb"], peer["empty_mb"]
            row["speed_against"] = {
                other: summarise([b / a for a, b in zip(times, seconds[other])])
                for other in ("torch-mimicry", "plain")
                if other in seconds and other != name
            }
            row["share_of_matrix_rate"] = (
                summarise([peer["tflop"] / s / rate for s, rate in zip(times, rates)]) if rates else None
            )
        rows.append(row)
    return rows


def draw_table(rows: list[dict]) -> str:
    """Return one size as text."""
    ratios = ("x mimicry", "(spread)", "x plain", "(spread)")
    lines = [
        ("peer", "", "G + D, M", "GFLOP", "seconds", "(spread)", "photos/s", "memory", *ratios, "TFLOP/s", "share")
    ]
    for row in rows:
        t, share = row["seconds"], row.get("share_of_matrix_rate")
        against = [row.get("speed_against", {}).get(other) for other in ("torch-mimicry", "plain")]
        lines.append(
            (
                row["peer"],
                row["precision"],
                f"{row['parameters_g'] / 1e6:.2f} + {row['parameters_d'] / 1e6:.2f}" if "parameters_g" in row else "",
                f"{1000 * row['tflop']:.0f}",
                f"{t['median']:.3f}",
                f"({t['low']:.3f}-{t['high']:.3f})",
                f"{row['images_per_second']:.1f}" if "images_per_second" in row else "",
                f"{row['memory_mb']:.0f} MB" if "memory_mb" in row else "",
                *(
                    text
                    for ratio in against
                    for text in (
                        (f"{ratio['median']:.2f}", f"({ratio['low']:.2f}-{ratio['high']:.2f})") if ratio else ("", "")
                    )
                ),
                f"{row['tflop_per_second']:.3g}",
                f"{100 * share['median']:.0f} %" if share else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    title = f"{rows[0]['size']} px, width {rows[0]['width']}, batch {rows[0]['batch']}"
    body = [
        "  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    return "\n".join(["", title, *("  " + line for line in body)])


def parse_net(text: str) -> tuple[int, int]:
    """Read "64" or "64:32", a side in pixels and the channels at full size."""
    try:
        size, width = map(int, text.split(":")) if ":" in text else (int(text), 64)
        if width < 1:
            raise ValueError
        return check_size(size), width
    except CarprotoError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE or SIZE:WIDTH, such as 128 or 64:32") from None


def at_least(low: int):
    """Make a reader of whole numbers that are not below `low`."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return read


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nets = [(32, 64), (64, 32), (64, 64), (128, 64)]
    parser.add_argument(
        "--sizes",
        type=parse_net,
        nargs="+",
        default=nets,
        metavar="SIZE[:WIDTH]",
        help="default 32 64:32 64 128; width 64",
    )
    parser.add_argument("--batch", type=at_least(2), default=8, help="pictures in a step, default 8")
    parser.add_argument("--rounds", type=at_least(1), default=4, help="turns of each peer, default 4")
    parser.add_argument(
        "--turn", type=float, default=1.0, metavar="SECONDS", help="a turn lasts at least so long, default 1"
    )
    parser.add_argument("--threads", type=at_least(1), default=count_cores(), help="of each peer, default all cores")
    parser.add_argument("--device", help="cpu or cuda; default the best at hand")
    error_p99 = [name for name in PEERS if name != COMPILED]
    parser.add_argument(
        "--peers", nargs="+", choices=list(PEERS), default=error_p99, metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/bench.json"), help="the record, default runs/bench/bench.json"
    )
    return parser.parse_args(argv)


def check_writable(path: Path) -> None:
    """Raise `CarprotoError` now, not after the measurement, when the record could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CarprotoError(f"cannot write {path}: {error.strerror}; choose another place with --out") from error


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; exit with one line for a mistake."""
    run_or_exit(run_bench, read_arguments(argv), stopped="stopped; the sizes that were done are in the record")


def run_bench(arguments: argparse.Namespace) -> None:
    """Time each size, print the tables and write the record."""
    device = pick_device(arguments.device)
    if device.type not in N_WARM_UP:
        raise CarprotoError(f"device {device} is not timed here: choose cpu or cuda")
    torch.set_num_threads(arguments.threads)
    names = [
        name for name in PEERS if name in arguments.peers and (name != "ours fp32" or pick_precision(device) != "fp32")
    ]
    record = {
        "environment": describe_environment(),
        "device": str(device),
        "rounds": arguments.rounds,
        "d_steps": D_STEPS,
    }
    record |= {"load_at_start": os.getloadavg()[0], "results": [], "absent": {}, "failed": {}}
    check_writable(arguments.out)
    machine = record["environment"]
    print(
        f"{machine['gpu'] if device.type == 'cuda' else machine['processor']}, "
        f"{machine['n_threads']} threads, torch {machine['torch']}"
    )
    if record["load_at_start"] > 0.3 * count_cores():
        print(
            f"Other programs are busy here (load {record['load_at_start']:.1f} on {count_cores()} cores): "
            "the times will be too long"
        )
    n_turns = len(arguments.sizes) * len(names) * (1 + arguments.rounds)
    with tqdm(total=n_turns, unit="turn", dynamic_ncols=True) as bar:
        for size, width in arguments.sizes:
            work = Work(size, width, arguments.batch, str(device))
            results = run_turns(names, work, arguments.rounds, arguments.turn, arguments.threads, bar)
            rows = make_rows(results, work)
            record["results"] += rows
            for kind in ("absent", "failed"):
                record[kind] |= {
                    f"{name}, {size} px, width {width}": peer[kind] for name, peer in results.items() if kind in peer
                }
            save_json(record, arguments.out)
            bar.write(draw_table(rows) if rows else f"{size} px, width {width}: nothing could be timed")
    memory = "allocated on the GPU" if device.type == "cuda" else "of the whole process"
    print(LEGEND.format(memory=memory))
    for name, reason in (record["absent"] | record["failed"]).items():
        print(f"Not timed: {name}: {reason}")
    print(f"Record: {arguments.out}")
    if record["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
