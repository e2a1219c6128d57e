"""Write contact sheets of unpicked samples to label, and fit the whole-car probes of a pair to the labels.

    python studies/whole_cars.py sheets photo128 --seed 900 --out sheets/
    python studies/whole_cars.py fit photo128 --labels data/records/whole_car_labels.json --out data/photo128/whole_cars

`sheets` shows 25 numbered images a sheet, of each generator, as the pair samples them: with rejection where it has
probes, without it where `--drawn` asks so. Labels name the broken cars of a seed, and those of which a looker was not
sure; each looker has a row. The cars are the first draws of their seeds; where sheets were made with rejection by
earlier probes, `draws` lists the accepted ones. A car's target is the mean over the lookers who saw it: 1 for broken,
0.35 for unsure. `fit` prints AUC and the broken share among accepted cars, cross-validated."""

import argparse
from pathlib import Path

import torch
from _record import run_or_exit
from PIL import Image, ImageDraw

from carproto.app.pipeline import CarPipeline
from carproto.core import sample_latents
from carproto.files import load_json
from carproto.images import to_bytes, to_picture
from carproto.latent.rejection import fit_whole_car_probe, stage_features
from carproto.weights import fingerprint

UNSURE = 0.35  # target of a car that a looker was not sure of
A_SHEET, SIDE = 25, 192  # images of a sheet, and their side in pixels


@torch.no_grad()
def generate(pipe: CarPipeline, kind: str, z: torch.Tensor) -> torch.Tensor:
    """Generate images of latents in parts."""
    return torch.cat([pipe.generator(kind)(part) for part in z.split(50)])


def write_sheets(pipe: CarPipeline, arguments: argparse.Namespace) -> None:
    """Write contact sheets of both generators."""
    if arguments.drawn:
        pipe.whole_cars = ()
    z = pipe.sample(arguments.n, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in ("common", "futuristic"):
        images = to_bytes(generate(pipe, kind, z))
        for start in range(0, arguments.n, A_SHEET):
            sheet = Image.new("RGB", (5 * (SIDE + 8), 5 * (SIDE + 24)), "white")
            for k, image in enumerate(images[start : start + A_SHEET]):
                x, y = k % 5 * (SIDE + 8) + 4, k // 5 * (SIDE + 24) + 20
                sheet.paste(to_picture(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
                ImageDraw.Draw(sheet).text((x, y - 16), str(start + k), fill="black")
            sheet.save(arguments.out / f"{kind}_{arguments.seed}_{start:03d}.png")


def read_targets(rows: list[dict]) -> dict[int, torch.Tensor]:
    """Return the mean label (n,) of each seed's cars."""
    labels = {}
    for row in rows:
        one = torch.zeros(row["n"])
        one[row["unsure"]] = UNSURE
        one[row["broken"]] = 1.0
        labels.setdefault(row["seed"], []).append(one)
    return {seed: torch.stack(seen).mean(0) for seed, seen in labels.items()}


def draw_latents(n: int, z_dim: int, seed: int, draws: list[int] | None) -> torch.Tensor:
    """Return the latents of a seed: the first draw of each, or that which rejection had accepted."""
    draws = draws or [0] * n
    latents = {draw: sample_latents(n, z_dim, seed, draw=draw) for draw in set(draws)}
    return torch.stack([latents[draw][i] for i, draw in enumerate(draws)])


def fit_probes(pipe: CarPipeline, arguments: argparse.Namespace) -> None:
    """Fit and save the probe of each generator."""
    record = load_json(arguments.labels)
    labels, draws = record["labels"], record["draws"]
    for kind, generator in zip(("common", "futuristic"), pipe.fingerprints):
        targets = read_targets(labels[kind])
        seeds = {seed: draws.get(str(seed)) for seed in targets}
        z = torch.cat([draw_latents(len(targets[seed]), pipe.common.z_dim, seed, some) for seed, some in seeds.items()])
        features = stage_features(pipe.encoder, generate(pipe, kind, z))
        accepted = arguments.accepted[kind == "futuristic"]
        broken = torch.cat([*targets.values()])
        nets = {"generator": generator, "encoder": fingerprint(pipe.encoder)}
        probe = fit_whole_car_probe(features, broken, **nets, accepted=accepted)
        probe.save(arguments.out / kind)
        print(f"{kind}: {probe.report}")


def main(argv: list[str] | None = None) -> None:
    """Write sheets or fit probes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sheets", "fit"), help="what to do")
    parser.add_argument("release", help="name or folder of the pair")
    parser.add_argument("--seed", type=int, default=900, help="of the sheets' latents")
    parser.add_argument("--n", type=int, default=200, help="images of each generator on the sheets")
    parser.add_argument("--drawn", action="store_true", help="sheets of latents as drawn, without rejection")
    parser.add_argument("--labels", type=Path, default=Path("data/records/whole_car_labels.json"))
    parser.add_argument(
        "--accepted", type=float, nargs=2, default=(0.75, 0.65), help="shares that pass: common, futuristic"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the sheets or of the probes")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    pipe = CarPipeline.from_pretrained(arguments.release)
    {"sheets": write_sheets, "fit": fit_probes}[arguments.task](pipe, arguments)


if __name__ == "__main__":
    run_or_exit(main)
