"""The benchmarks run. They are not part of the tests, so one of each kind runs here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from custom_backprop.testing import database

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are not installed
benchmarks = importlib.import_module("benchmarks.test_ops")


@pytest.mark.parametrize("direction", benchmarks.DIRECTIONS)
@pytest.mark.parametrize("which", ["ours", "stock"])
def test_an_op_is_timed(benchmark, direction, which):
    benchmarks.test_op(benchmark, database()["relu6"], "small", direction, which)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["rows", "products"])
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
