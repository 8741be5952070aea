"""The benchmarks run: they are not part of the suite, so one of each kind is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from custom_backprop.testing import database

sys.path.append(str(Path(__file__).parents[2]))  # where the benchmarks are, which no one installs
benchmarks = importlib.import_module("benchmarks.test_ops")


@pytest.mark.parametrize("direction", benchmarks.DIRECTIONS)
@pytest.mark.parametrize("which", ["ours", "stock"])
def test_an_op_is_timed(benchmark, direction, which):
    benchmarks.test_op(benchmark, database()["relu6"], "small", direction, which)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["rows", "products"])
def test_what_needs_a_gpu_says_so(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "needs a GPU" in capsys.readouterr().err


def test_a_row_that_fails_is_one_row(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of something")

    report = importlib.import_module("benchmarks.report")
    monkeypatch.setattr(report, "pair", fails)
    row = report._row(database()["relu"], "small", "forward", "cpu", 0.1)
    assert row["error"] == "out of something"
    assert "relu small forward" in capsys.readouterr().err
    assert "| relu | failed |" in report._markdown({}, [row], "name")
