"""The studies measure what they say, and go on where they were stopped."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from carproto.config import CarprotoError, JointConfig, TrainConfig
from carproto.core import sample_latents
from carproto.files import load_json
from carproto.gan.finetune import child_config, finetune_freezed
from carproto.gan.fused_conv import ConvPool, UpConv
from carproto.gan.sngan import (
    Discriminator,
    Generator,
    load_generator,
    measure_statistics,
    save_discriminator,
    save_generator,
)
from carproto.gan.train import train_gan
from carproto.images import to_picture
from carproto.latent.encoder import StyleEncoder, load_encoder, save_encoder
from carproto.latent.joint import tune_jointly
from carproto.run import RunFolder, load_checkpoint
from carproto.toycars.dataset import ToyCars
from carproto.toycars.shape import FUTURISTIC
from carproto.weights import fingerprint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import _record as study_record  # noqa: E402
import freezed as study_freezed  # noqa: E402
import halve_pair as study_halve  # noqa: E402
import parity as study_parity  # noqa: E402
import photo_blends as study_blends  # noqa: E402
import photo_pair as study_pair  # noqa: E402
import train_release as train_pair  # noqa: E402
import training_recipe as study_recipe  # noqa: E402
import whole_cars as study_whole_cars  # noqa: E402
from milestone import write_milestone  # noqa: E402

TINY = ["--n_heldout", "16", "--n_train", "16"]


def test_readme_names_every_study_and_record():
    text = (ROOT / "studies/README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "studies").glob("*.py")}
    named = set(re.findall(r"\b\w+\.py\b", text))
    assert scripts == named, f"not in studies/README.md, or not there: {sorted(scripts ^ named)}"
    records = {path.name for path in (ROOT / "data/records").glob("*.json")}
    named = set(re.findall(r"`(\w+\.json)`", text))
    assert records == named, f"not in studies/README.md, or not there: {sorted(records ^ named)}"


def test_record_names_command_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["studies/ema.py", "--run", "some/where/common"])
    record = load_json(study_record.save_record({"kid": 1.5}, tmp_path / "ema.json"))
    assert record["command"] == "python studies/ema.py --run common" and record["kid"] == 1.5
    assert {"processor", "n_cores", "torch", "commit"} <= record["machine"].keys()


def test_a_killed_demo_ends_as_one_that_was_not(tmp_path):
    path = tmp_path / "kills.json"  # in a process of its own: it forks
    command = [sys.executable, ROOT / "studies" / "demo_kills.py", "--kills", "2", "--out", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    record = load_json(path)
    assert record["different"] == [] and len(record["kills"]) == 2
    names = "\n".join(record["compared"])
    runs = ("common", "subspace", "futuristic", r"encoder-\w+")
    assert all(re.search(f"^{run}/checkpoints$", names, re.M) for run in runs)
    compared = {"common/best/model.safetensors", "futuristic/final/model.safetensors", "numbers.json", "report.html"}
    assert compared <= set(record["compared"])


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """Train a parent for seconds."""
    folder = tmp_path_factory.mktemp("runs") / "parent"
    config = TrainConfig(size=16, width=4, z_dim=8, batch=4, steps=4, report_every=4)
    train_gan(ToyCars(16, 16, progress=False).images, folder, config, quiet=True, device="cpu")
    return folder


def test_cell_takes_the_steps_of_finetune_freezed(parent, tmp_path):
    cars, state = ToyCars(16, 16, futurism=FUTURISTIC, progress=False).images, load_checkpoint(parent / "checkpoints")
    changes = {**study_freezed.CHILD, "batch": 4, "steps": 3, "seed": 1}
    finetune_freezed(parent, cars, tmp_path / "child", n_frozen=2, quiet=True, device="cpu", **changes)
    wanted = load_checkpoint(tmp_path / "child/checkpoints")
    for _ in range(2):  # the second cell must find the parent as the first one did
        config = child_config(TrainConfig(**RunFolder(parent).config()), 2, changes)
        trainer = study_freezed.start_cell(state, config, cars)
        trainer.load_fused(wanted["fused_layers"])
        study_freezed.run_steps(trainer, tqdm(disable=True))
        for part in ("G_ema", "D"):
            results = getattr(trainer, part).state_dict()
            assert all(torch.equal(results[name], value) for name, value in wanted[part].items())


def test_freezed_goes_on_and_keeps_to_its_choices(parent, tmp_path, capsys):
    options = [
        "toys",
        "--parent",
        str(parent),
        "--steps",
        "1",
        "--batch",
        "4",
        "--n_fake",
        "16",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    study_freezed.main([*options, "--seeds", "5"])
    path = tmp_path / "freezed_toys.jsonl"
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["seed"], row["depth"], row["augment"], row["lecam"]) for row in rows] == [
        (5, depth, augment, lecam) for depth in range(4) for augment in (True, False) for lecam in (True, False)
    ]
    assert {"kid", "kid_sd", "frechet", "precision", "coverage", "copy_rate", "futurism", "seconds", "commit"} <= rows[
        0
    ].keys()
    assert len({row["kid"] for row in rows}) > 4
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["parent"]["config"]["width"] == 4 and about["parent"]["step"] == 4 and about["n_train"] == 16
    assert {"kid", "futurism"} <= about["before"].keys() and about["real"]["kid"] < about["before"]["kid"]
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])
    study_freezed.main([*options, "--seeds", "5"])
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:-1] == rows[:-1] and again[-1]["kid"] == rows[-1]["kid"]
    with pytest.raises(SystemExit, match="made with another child: take another --out"):
        study_freezed.main([*options, "--steps", "2"])
    with pytest.raises(SystemExit, match="holds no trained run"):
        study_freezed.main(["toys", "--parent", str(tmp_path)])
    with pytest.raises(SystemExit):
        study_freezed.main(["photos", "--parent", str(parent)])
    assert "need --concepts" in capsys.readouterr().err


def test_command_in_the_record_names_no_place(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/there/studies/freezed.py", "toys", "--parent", "/there/runs/toys", "--steps", "5"]
    )
    assert study_record.describe_command() == "python studies/freezed.py toys --parent toys --steps 5"


def test_parity_compares_what_it_says(tmp_path):
    options = [
        "--steps",
        "4",
        "--n_measured",
        "2",
        "--size",
        "16",
        "--width",
        "4",
        "--batch",
        "4",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    study_parity.main([*options, "--seeds", "0"])
    study_parity.main([*options, "--seeds", "0", "1"])
    rows = [json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["variant"]) for row in rows] == [(0, "plain"), (0, "ours"), (1, "ours"), (1, "plain")]
    runs = {(row["seed"], row["variant"]): row for row in rows}
    assert all([position["step"] for position in row["measured"]] == [2, 4] for row in rows)
    assert runs[0, "plain"]["precision"] == "fp32" and runs[0, "plain"]["n_fused"] == 0 < runs[0, "ours"]["n_fused"]
    first = {run: row["measured"][0]["kid"] for run, row in runs.items()}
    assert first[0, "plain"] == pytest.approx(first[0, "ours"], rel=0.1) != first[1, "plain"]
    about = json.loads((tmp_path / "parity.json").read_text())
    assert about["config"]["lecam_start"] == 0 and about["n_heldout"] == 16 and about["command"] and about["machine"]


def test_forms_are_as_named():
    images, config = ToyCars(8, 16, progress=False).images, TrainConfig(size=16, width=4, z_dim=8, batch=4)
    plain, ours = (study_parity.make_trainer(images, config, variant, "fp32") for variant in study_parity.VARIANTS)
    for trainer, is_fused in ((plain, False), (ours, True)):
        assert {layer.is_fused for layer in trainer.D.modules() if isinstance(layer, ConvPool)} == {is_fused}
        assert {layer.is_fused for layer in trainer.G.modules() if isinstance(layer, UpConv)} == {False}
    with pytest.raises(CarprotoError, match="unknown"):
        study_parity.make_trainer(images, config, "ours", "fp8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, str]:
    """Folders of pictures, as a person would have them."""
    folder, sets = (
        tmp_path_factory.mktemp("photos"),
        {"data": 40, "heldout": 24, "concepts": 32, "concepts_heldout": 24},
    )
    for seed, (name, n) in enumerate(sets.items()):
        (folder / name).mkdir()
        kind = {"futurism": FUTURISTIC} if "concept" in name else {}
        for i, image in enumerate(ToyCars(n, 32, seed=seed, progress=False, **kind).images):
            to_picture(image).save(folder / name / f"{i}.png")
    return {name: str(folder / name) for name in sets}


def test_recipes_differ_as_they_say(photos, tmp_path):
    options = [
        "compare",
        "--data",
        photos["data"],
        "--heldout",
        photos["heldout"],
        "--backbone",
        "toys",
        "--size",
        "16",
        "--width",
        "4",
        "--batch",
        "4",
        "--steps",
        "2",
        "--n_measured",
        "1",
        "--n_fake",
        "24",
        "--out",
        str(tmp_path),
    ]
    study_recipe.main([*options, "--seeds", "0", "--recipes", "2022"])
    study_recipe.main([*options, "--seeds", "0"])
    rows = [json.loads(line) for line in (tmp_path / "recipe_compare.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows] == list(study_recipe.RECIPES)
    assert len({row["measured"][-1]["kid"] for row in rows}) == len(rows)
    assert all(set(row["emas"]) == {"raw", "1000", "3000", "30000"} for row in rows)
    assert {"kid", "frechet", "coverage", "copy_rate", "seconds"} <= rows[0]["measured"][-1].keys()
    with pytest.raises(SystemExit, match="no such recipe"):
        study_recipe.main([*options, "--recipes", "2032"])


def test_recipes_take_turns_for_their_time(photos, tmp_path):
    study_recipe.main(
        ["time", "--data", photos["data"], "--size", "16", "--width", "4", "--batch", "4", "--out", str(tmp_path)]
    )
    results = json.loads((tmp_path / "recipe_time.json").read_text())["seconds"]
    assert set(results) == {"2022", "carproto", "one D step"}
    assert {len(values) for values in results.values()} == {8}
    assert min(min(values) for values in results.values()) > 0


def test_batch_decides_in_the_recipe_of_2022():
    G, z = Generator(16, 8, 4), sample_latents(8, 8)
    by_batch = study_recipe.ByBatch(G).eval()
    assert not torch.allclose(by_batch(z)[:4], by_batch(z[:4]), atol=1e-3)
    assert torch.allclose(G.eval()(z)[:4], G(z[:4]), atol=1e-5)


def test_pair_from_photos_to_release_in_pieces(photos, tmp_path):
    sources = [word for name, path in photos.items() for word in (f"--{name}", path)]
    options = [
        "tiny",
        *sources,
        "--backbone",
        "toys",
        "--size",
        "16",
        "--width",
        "4",
        "--batch",
        "8",
        "--z_dims",
        "8",
        "6",
        "4",
        "--n_frozen",
        "1",
        "--steps",
        "4",
        "6",
        "3",
        "3",
        "--report_every",
        "2",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "data"),
    ]
    with pytest.raises(SystemExit, match="the same command goes on"):
        train_pair.main([*options, "--max_minutes", "0.00001"])
    train_pair.main(options)
    parts = {part: tmp_path / "data" / "tiny" / part for part in ("common", "futuristic", "encoder")}
    common, futuristic = (load_generator(parts[part], "cpu") for part in ("common", "futuristic"))
    assert common.z_dim == futuristic.z_dim == 4 and common.size == 16
    assert load_encoder(parts["encoder"], fingerprint=common.fingerprint(), device="cpu").z_dim == 4
    text = {
        part: load_json(tmp_path / "data" / "tiny" / "record" / part / "evaluation.json")
        for part in ("common", "futuristic")
    }
    assert text["common"]["n_fake"] == 1000 and {"kid", "copy_rate"} <= text["futuristic"].keys()
    train_pair.main(options)
    assert (
        load_generator(parts["futuristic"], "cpu").fingerprint() == futuristic.fingerprint()
    )  # all was done: nothing is trained again


def _distances(n: int, largest: float) -> torch.Tensor:
    """Return features (n, 2) whose distances to the origin rise evenly from 0."""
    return torch.linspace(0, largest, n)[:, None] * torch.tensor([0.6, 0.8])


def test_a_frame_is_unrealistic_where_it_is_further_off_than_held_out_photos_of_its_kind():
    train, unseen = torch.zeros(1, 2), [_distances(201, 10.0), _distances(21, 20.0)]
    frames = torch.zeros(3, 5, 2)  # of three pairs
    frames[0, 0, 0] = 9.6  # beyond what 95 % of common photos reach, 9.5
    frames[1, 4, 0] = 18.9  # 95 % of the concept photos are nearer than 19
    frames[1, 2, 0] = 14.2  # and halfway the limit is 14.25
    measured = study_blends.measure_realism(frames.flatten(0, 1), [[0, 1, 200], [20, 19, 0]], train, unseen)
    realism = measured["realism"]
    assert realism["limits"] == pytest.approx({"common": 9.5, "futuristic": 19.0}, rel=1e-4)
    assert realism["share_beyond_by_intensity"] == pytest.approx([1 / 3, 0, 0, 0, 0])
    assert realism["share_of_pairs_with_a_frame_beyond"] == pytest.approx(1 / 3)
    assert realism["share_of_pairs_with_a_photo_beyond"] == pytest.approx(2 / 3)  # the first's last, the third's first


def test_one_limit_for_all_photos_follows_the_larger_set_and_is_reported_with_whom_it_rejects():
    train, unseen = torch.zeros(1, 2), [_distances(201, 10.0), _distances(21, 20.0)]
    frames = torch.zeros(3, 5, 2)
    frames[1, 4, 0] = 18.9
    measured = study_blends.measure_realism(frames.flatten(0, 1), [[0, 1, 2], [0, 1, 2]], train, unseen)
    pooled = measured["realism_pooled"]
    assert 9.5 < pooled["limit"] < 11  # near that of the 201
    rejected = pooled["share_of_heldout_photos_beyond"]
    assert rejected["common"] < 0.05 and rejected["futuristic"] > 0.4
    assert pooled["share_of_pairs_with_a_frame_beyond"] == pytest.approx(1 / 3)
    assert measured["realism"]["share_of_pairs_with_a_frame_beyond"] == 0


def test_photo_pair_grows_a_run_of_64_px_and_goes_on_with_its_options(tmp_path, monkeypatch):
    for module in ("trainer", "grow"):  # 2,048 images at 128 px take most of the time
        few = partial(measure_statistics, n_batches=2, batch=8)
        monkeypatch.setattr(f"carproto.gan.{module}.measure_statistics", few)
    tiny = {"width": 2, "z_dim": 8, "batch": 4, "photo_batch": 4, "encoder_width": 8, "lecam_weight": 0.0}
    monkeypatch.setattr(study_pair, "JOINT", JointConfig(size=64, steps=1, report_every=1, **tiny))
    frame = SimpleNamespace(config=study_pair.AlignConfig())
    opened = {size: SimpleNamespace(images=ToyCars(16, size, seed=1).images, align=frame) for size in (64, 128)}
    monkeypatch.setattr(study_pair, "open_aligned", lambda path, arguments, size: opened[size])
    monkeypatch.setattr(study_pair, "mobilenet_extractor", lambda path, size: None)
    monkeypatch.setattr(study_pair, "Evaluator", lambda *images, **options: SimpleNamespace(evaluate=lambda G: {}))
    monkeypatch.setattr(study_pair, "GROW_STEPS", 1)
    tune_jointly(opened[64].images, tmp_path / "64", study_pair.JOINT, parent=None, quiet=True, device="cpu")
    inputs = ["joint", "--data", "a.zip", "--heldout", "b.zip", "--extractor", "x", "--size", "128", "--threads", "1"]
    for _ in range(2):  # the second time nothing is left to do
        study_pair.main([*inputs, "--source", str(tmp_path / "64"), "--run", str(tmp_path / "128")])
    assert load_generator(tmp_path / "128/final", "cpu").size == 128
    assert RunFolder(tmp_path / "128").config()["grow_steps"] == 300
    write_milestone(tmp_path / "128", tmp_path / "milestone")
    study_pair.main([*inputs, "--source", str(tmp_path / "milestone"), "--run", str(tmp_path / "again")])
    assert RunFolder(tmp_path / "again").config()["grow_steps"] == 0  # all layers have been trained at 128 px
    encoder = ["encoder", *inputs[1:], "--source", str(tmp_path / "again"), "--run", str(tmp_path / "encoder")]
    with pytest.raises(CarprotoError, match="name --concepts"):
        study_pair.main([*encoder, "--child", str(tmp_path / "128")])
    study_pair.main([*encoder, "--child", str(tmp_path / "128"), "--concepts", "c.zip"])
    assert json.loads((tmp_path / "encoder/data.json").read_text())["child"]["n_images"] == 16
    names = [tmp_path / run / "final" for run in ("again", "encoder")]
    generators = [load_generator(name, "cpu") for name in names]
    encoders = [load_encoder(name / "encoder", device="cpu") for name in names]
    assert generators[0].fingerprint() == generators[1].fingerprint()
    assert fingerprint(encoders[0]) != fingerprint(encoders[1])


def test_halve_pair_makes_a_pair_whose_encoder_goes_on(tmp_path, monkeypatch):
    tiny = {"width": 2, "z_dim": 8, "batch": 4, "photo_batch": 4, "encoder_width": 8, "lecam_weight": 0.0}
    frame = SimpleNamespace(config=study_pair.AlignConfig())
    opened = {size: SimpleNamespace(images=ToyCars(16, size, seed=1).images, align=frame) for size in (64, 128)}
    monkeypatch.setattr(study_pair, "JOINT", JointConfig(size=64, steps=1, report_every=1, **tiny))
    for study in (study_pair, study_halve):
        monkeypatch.setattr(study, "open_aligned", lambda path, arguments, size: opened[size])
    monkeypatch.setattr(study_pair, "mobilenet_extractor", lambda path, size: None)
    monkeypatch.setattr(study_pair, "Evaluator", lambda *images, **options: SimpleNamespace(evaluate=lambda G: {}))
    G = Generator(128, 8, 1, max_channels=32, seed=1).eval().requires_grad_(False)
    E = StyleEncoder(128, 8, 8, channels=[shape[0] for shape in G.gain_shapes], generator=G.fingerprint()).eval()
    E.fit_projection(opened[128].images)
    for kind in ("common", "futuristic"):
        save_generator(G, tmp_path / "whole" / kind)
    save_encoder(E, tmp_path / "whole/encoder")
    for size in (32, 64):
        save_discriminator(Discriminator(size, 2), tmp_path / f"D{size}")
    photos, out = ["--data", "a.zip", "--concepts", "c.zip", "--threads", "1"], tmp_path / "half"
    command = [str(tmp_path / "whole"), *photos, "--steps", "1", "--out", str(out)]
    with pytest.raises(CarprotoError, match="takes 32 px, not 64"):
        study_halve.main([*command, "--discriminator", str(tmp_path / "D32")])
    study_halve.main([*command, "--discriminator", str(tmp_path / "D64")])
    with pytest.raises(CarprotoError, match="exists: name a new folder"):
        study_halve.main([*command, "--discriminator", str(tmp_path / "D64")])
    half = load_generator(out / "common/final", "cpu")
    smaller = load_encoder(out / "common/final/encoder", fingerprint=half.fingerprint(), device="cpu")
    assert (half.size, smaller.size, smaller.side) == (64, 64, 128)
    line = ["encoder", *photos, "--heldout", "b.zip", "--extractor", "x", "--source", str(out / "milestone")]
    pair = ["--generator", str(out / "common"), "--child", str(out / "futuristic")]
    study_pair.main([*line, *pair, "--run", str(tmp_path / "encoder")])
    final = tmp_path / "encoder/final"
    trained = load_encoder(final / "encoder", fingerprint=half.fingerprint(), device="cpu")
    assert trained.side == 128 and fingerprint(trained) != fingerprint(smaller)


def test_one_inversion_is_taken_out_of_many():
    from carproto.app.photos import PhotoInversion

    rows = {name: torch.arange(3.0)[:, None] for name in ("z", "z_start", "channel_gains", "channel_gains_start")}
    images = {name: torch.zeros(3, 3, 4, 4) for name in ("images", "images_start")}
    numbers = {name: torch.arange(3.0) for name in ("distance", "distance_start", "rms", "seconds", "rms_latent")}
    many = PhotoInversion(**rows, **images, **numbers, names=["a", "b", "c"], outliers=[2], has_channel_gains=True)
    one = study_blends.select(many, 1)
    assert one.car(0) == ([1.0], [1.0]) and one.names == ["b"] and one.outliers == []


def test_mistake_ends_a_study_in_one_line():
    def fail(text: str) -> None:
        raise CarprotoError(text)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^test_studies: no photos$"):
        study_record.run_or_exit(fail, text="no photos")
    with pytest.raises(SystemExit, match="^test_studies: stopped after 3$"):
        study_record.run_or_exit(stop, stopped="stopped after 3")
    assert study_record.run_or_exit(lambda a, b: a - b, 5, b=3) == 2


def test_whole_cars_sheets_and_targets(tmp_path):
    """Sheets number each generator's samples; targets are means over lookers; draws name accepted latents."""
    study_whole_cars.main(["sheets", "toy64", "--seed", "3", "--n", "30", "--out", str(tmp_path)])
    names = {f"{kind}_3_{start:03d}.png" for kind in ("common", "futuristic") for start in (0, 25)}
    assert {path.name for path in tmp_path.iterdir()} == names
    rows = [{"seed": 3, "n": 4, "broken": [0], "unsure": [1]}, {"seed": 3, "n": 4, "broken": [0, 2], "unsure": []}]
    assert torch.allclose(study_whole_cars.read_targets(rows)[3], torch.tensor([1.0, 0.175, 0.5, 0.0]))
    drawn = study_whole_cars.draw_latents(2, 6, 3, [1, 0])
    assert torch.equal(drawn, torch.stack([sample_latents(2, 6, 3, draw=1)[0], sample_latents(2, 6, 3)[1]]))
