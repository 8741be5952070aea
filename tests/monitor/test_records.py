"""Where readings go: lines of JSON, TensorBoard, a heat map, the terminal."""

from __future__ import annotations

import json
import math
import sys

import pytest
from monitor_helpers import network, train, watched

from custom_backprop.monitor import (
    CURES,
    GradientMonitor,
    JSONLines,
    TensorBoard,
)


def test_json_lines(tmp_path):
    model = network()
    model[2].weight.data[0, 0] = math.nan
    monitor = GradientMonitor(model, every=1, writer=JSONLines(tmp_path / "all.jsonl", layers=True))
    train(model, monitor, 2)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["norm"] is None
    assert lines[0]["2/nonfinite"] > 0
    assert lines[0]["verdicts"][0]["layer"] == "2"
    assert lines[0]["verdicts"][0]["cure"] == CURES["non-finite"]
    JSONLines(tmp_path / "totals.jsonl").write(monitor.history[0])
    assert set(json.loads((tmp_path / "totals.jsonl").read_text())) == {"step", "norm", "verdicts"}


def test_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)

    written = []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == str(tmp_path)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_text(self, name, text, step):
            written.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    model = network()
    model[2].bias.data.fill_(-100)
    train(model, GradientMonitor(model, every=1, writer=TensorBoard(tmp_path, layers=True)), 1)
    assert {
        ("gradients/norm", 1),
        ("gradients/4/norm", 1),
        ("gradients/1/activation_zeros", 1),
        ("gradients/verdicts", 1),
    } <= set(written)


def test_heat_map(tmp_path, monkeypatch):
    from matplotlib.image import imread

    model = network()
    monitor = GradientMonitor(model, every=1)
    with pytest.raises(ValueError, match="nothing has been read yet"):
        monitor.heat_map(tmp_path / "map.png")
    train(model, monitor, 4)
    steps, names, table = monitor.norms()
    assert (steps, names) == ([1, 2, 3, 4], ["0", "2", "4", "6"])
    assert table[1][3] == monitor.history[3]["2"].norm
    monitor.heat_map(tmp_path / "map.png")
    assert imread(tmp_path / "map.png").std() > 0.05
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        monitor.heat_map(tmp_path / "map.png")


def test_prints():
    model = network()
    reading = watched(model, 2)
    assert str(reading).startswith("step 2: gradient norm ")
    assert len(reading.table().splitlines()) == 1 + len(reading.layers)
    with pytest.raises(KeyError, match="no layer 'x'; there are: 0, 1"):
        reading["x"]
