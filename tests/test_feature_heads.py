"""The step time of the feature heads is recorded with both clocks, and its ratios are those of the rounds."""
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import feature_heads  # noqa: E402

TINY = ["--size", "16", "--batch", "4", "--rounds", "2", "--steps", "1", "--precision", "fp32", "--widths", "4"]


def test_record_holds_rounds_and_ratios(tmp_path, monkeypatch):
    weights, record_path = tmp_path / "squeezenet.safetensors", tmp_path / "record.json"
    torch.manual_seed(0)
    state = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    argv = ["--squeezenet", str(weights), *TINY, "--out", str(record_path)]
    monkeypatch.setattr(sys, "argv", ["feature_heads.py", *argv])
    feature_heads.main(argv)
    record = json.loads(record_path.read_text(encoding="utf-8"))
    assert str(tmp_path) not in record["command"] and {"commit", "processor"} <= record["machine"].keys()
    (result,) = record["results"]
    for clock in ("cpu", "wall"):
        ratios = [turn["with"][clock] / turn["without"][clock] for turn in result["rounds"]]
        assert len(ratios) == 2 and result[clock]["ratio"] == pytest.approx(statistics.median(ratios))
        assert result[clock]["low"] == min(ratios) and result[clock]["ratio"] > 1  # the heads add work to each step


def test_missing_weights_end_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^feature_heads: .*does not exist"):
        feature_heads.main(["--squeezenet", str(tmp_path / "none"), *TINY, "--out", str(tmp_path / "record.json")])
