"""The tool that makes releases: the precision of their weights, their fingerprints and their size."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import release  # noqa: E402

from carproto import CarPipeline  # noqa: E402
from carproto.core import sample_latents  # noqa: E402
from carproto.files import save_json  # noqa: E402
from carproto.gan.sngan import (  # noqa: E402
    Discriminator,
    Generator,
    load_generator,
    save_discriminator,
    save_generator,
)
from carproto.latent.encoder import LatentEncoder, save_encoder  # noqa: E402

FILES = ("common", "futuristic", "encoder", "common/discriminator")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of an untrained pair, whose first layer is large enough to be quantized."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, part in enumerate(("common", "futuristic")):
        G = Generator(32, 128, 8, seed=seed).eval()
        save_generator(G, folder / part / "best")
        save_json({"data": "/elsewhere/cars.zip"}, folder / part / "data.json")
    save_discriminator(Discriminator(32, 4), folder / "common" / "discriminator")
    E = LatentEncoder(32, 128, 8, generator=load_generator(folder / "common" / "best", "cpu").fingerprint())
    save_encoder(E.eval(), folder / "common" / "encoder")
    parts = {"common": "common", "futuristic": "futuristic", "encoder": "common"}
    return [word for part, name in parts.items() for word in (f"--{part}", str(folder / name))]


def dtypes(folder: Path) -> dict[str, set]:
    """Find the number formats of a release's files."""
    found = {}
    for part in FILES:
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            found[part] = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no dict
    return found


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("photo32", [], {torch.int8, torch.bfloat16, torch.float16}),
        ("photo32", ["--precision", "fp16"], {torch.float16}),
        ("raw32", [], {torch.float16}),
        ("raw32", ["--precision", "fp32"], {torch.float32}),
    ],
)
def test_precision_of_a_release(runs, tmp_path, name, options, expected):
    release.main([name, *runs, *options, "--data", str(tmp_path)])
    assert dtypes(tmp_path / name)["common"] == dtypes(tmp_path / name)["futuristic"] == expected
    assert torch.int8 not in dtypes(tmp_path / name)["common/discriminator"]  # all of its layers are small


def test_int8_pair_is_bound_to_its_encoder_and_generates_like_the_run(runs, tmp_path, capsys):
    release.main(["photo32", *runs, "--data", str(tmp_path)])
    assert "all photo pairs: 0." in capsys.readouterr().out
    pipe = CarPipeline.from_pretrained(tmp_path / "photo32")
    original = load_generator(Path(runs[1]) / "best", "cpu")
    assert pipe.encoder is not None and pipe.encoder.generator == pipe.fingerprints[0] != original.fingerprint()
    z = sample_latents(8, 128, seed=0)
    assert 0 < (pipe.common(z) - original(z)).abs().mean() * 127.5 < 1


def test_size_of_all_photo_pairs_is_compared_with_their_limit(tmp_path, monkeypatch):
    for name, n in (("photo64", 3000), ("photo128", 4000), ("toy64", 9000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(n * 1000))
    monkeypatch.setattr(release, "LIMIT_MB", 7)
    text = release.describe_size(tmp_path, "photo64")
    assert text == f"{tmp_path / 'photo64'}: 3.0 MB; all photo pairs: 7.0 MB, of at most 7 MB"
    monkeypatch.setattr(release, "LIMIT_MB", 6)
    assert release.describe_size(tmp_path, "photo128").endswith("all photo pairs: 7.0 MB, more than 6 MB")
    assert release.describe_size(tmp_path, "toy64") == f"{tmp_path / 'toy64'}: 9.0 MB"
