"""The benchmarks run. They are not part of the tests, so one of each kind runs here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_is_a_picture

import custom_backprop
from custom_backprop.testing import database

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are not installed
benchmarks = importlib.import_module("benchmarks.test_ops")


@pytest.mark.parametrize("direction", benchmarks.DIRECTIONS)
@pytest.mark.parametrize("which", ["ours", "stock"])
def test_an_op_is_timed(benchmark, direction, which):
    benchmarks.test_op(benchmark, database()["relu6"], "small", direction, which)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["products", "gpu.__main__"])
def test_benchmarks_that_need_a_gpu_say_so(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "needs a GPU" in capsys.readouterr().err


def test_an_op_that_fails_costs_one_row(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of something")

    report = importlib.import_module("benchmarks.report")
    monkeypatch.setattr(report, "pair", fails)
    row = report._row(database()["relu"], "small", "forward", "cpu", 0.1)
    assert row["error"] == "out of something"
    assert "relu small forward" in capsys.readouterr().err
    assert "| relu | failed |" in report._markdown({}, [row], "name")


def test_other_processes_end_with_the_block():
    measure = importlib.import_module("benchmarks.measure")
    with measure.busy(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode for process in started)


@pytest.fixture
def models(monkeypatch, tmp_path):
    """``benchmarks.models``, and its main() with options. Results go to tmp_path."""
    module = importlib.import_module("benchmarks.models")

    def main(*options):
        command = ["models", "--quick", "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        return module.main()

    return module, main


def test_models_are_trained(models, tmp_path):
    _, main = models
    names = ["resnet", "swiglu-mlp"]
    if importlib.util.find_spec("transformers"):
        names += ["llama", "gpt2", "bert", "vit"]
    assert main(*names) == 0
    rows = json.loads((tmp_path / "models-cpu.json").read_text())["rows"]
    assert [(r["network"], r["side"]) for r in rows] == [
        (name, side) for name in names for side in ("stock", "converted")
    ]
    for row in rows:
        assert row["difference"] < 1e-5
        assert min(row["per_second"], row["peak_bytes"], row["ratio"]) > 0
    assert_is_a_picture(tmp_path / "models-cpu.png")


def test_models_say_what_they_skip(models, monkeypatch, tmp_path, capsys):
    _, main = models
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name == "torch" else None
    )
    assert main("llama") == 1
    assert main("vit", "swiglu-mlp") == 0
    for text in (capsys.readouterr().err, (tmp_path / "models-cpu.md").read_text()):
        assert "skipped: vit, which need `pip install 'custom_backprop[hf]'`" in text


def test_a_side_that_fails_costs_one_cell(models, monkeypatch, tmp_path, capsys):
    def fails(model):
        raise RuntimeError("out of something")

    _, main = models
    monkeypatch.setattr(custom_backprop, "convert", fails)
    assert main("swiglu-mlp") == 1
    assert "swiglu-mlp converted: out of something" in capsys.readouterr().err
    page = (tmp_path / "models-cpu.md").read_text()
    assert page.count("| failed |") == 3, "of speed, memory and loss"


def test_an_interrupted_benchmark_keeps_what_it_has(models, monkeypatch, tmp_path, capsys):
    module, main = models
    measured = module.measured

    def interrupted(name, *rest):
        if name == "resnet":
            raise KeyboardInterrupt
        return measured(name, *rest)

    monkeypatch.setattr(module, "measured", interrupted)
    assert main("swiglu-mlp", "resnet") == 130
    assert "have the models before resnet" in capsys.readouterr().err
    rows = json.loads((tmp_path / "models-cpu.json").read_text())["rows"]
    assert {r["network"] for r in rows} == {"swiglu-mlp"}
