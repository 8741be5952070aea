"""The examples of vanishing and exploding gradients, small, end to end: what they conclude, their
pictures, a run that is interrupted."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from helpers import assert_is_a_picture

SMALL = {
    "vanishing_gradients": ("--epochs", 1, "--depth", 2),
    "exploding_gradients": ("--epochs", 1),
}


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def rows(table, names):
    """The table's cells by the name that each line starts with: two spaces stand between cells."""
    found = {
        name: cells
        for name, *cells in (re.split(r" {2,}", line) for line in table.splitlines())
        if name
    }
    assert list(found) == list(names)
    return found


def test_vanishing_gradients(example, tmp_path, capsys):
    module, main = example("vanishing_gradients")
    main("--epochs", 1, "--depth", 14, "--out", tmp_path)
    out, table = capsys.readouterr().out, (tmp_path / "table.txt").read_text()
    assert sorted(os.listdir(tmp_path)) == ["table.txt", "vanishing_gradients.png"], (
        "a finished run leaves no checkpoint"
    )
    assert all(f"wrote {tmp_path / name}" in out for name in os.listdir(tmp_path))
    assert table in out
    assert "trains the digits (90% and more): " in out.splitlines()[-1]
    assert_is_a_picture(tmp_path / "vanishing_gradients.png")
    found = rows(
        table,
        [f"{activation}, {start}" for activation in module.ACTIVATIONS for start in module.STARTS],
    )
    first = {name: float(row[0]) for name, row in found.items()}
    verdicts = {name: row[4] for name, row in found.items()}
    for activation in module.ACTIVATIONS:
        assert first[f"{activation}, small"] < 1e-4
        assert "vanishing" in verdicts[f"{activation}, small"]
        assert first[f"{activation}, small + clip"] == first[f"{activation}, small"], (
            "clipping does not help"
        )
        assert first[f"{activation}, small + norm"] > 0.01
        assert "vanishing" not in verdicts[f"{activation}, small + norm"]
    assert (
        first["sigmoid, small"]
        < first["sigmoid, Xavier"]
        < first["sigmoid, Kaiming"]
        < first["sigmoid, LSUV"]
        < 1e-3
    )
    assert "vanishing" in verdicts["sigmoid, LSUV"]
    for name in ("tanh, Xavier", "tanh, LSUV", "relu, Kaiming", "relu, LSUV"):
        assert first[name] > 0.01
        assert verdicts[name] == "-"


def test_exploding_gradients(example, tmp_path, capsys):
    module, main = example("exploding_gradients")
    main("--epochs", 2, "--out", tmp_path)
    out = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["exploding_gradients.png", "table.txt"]
    assert_is_a_picture(tmp_path / "exploding_gradients.png")
    assert float(out.splitlines()[-1].rpartition("=")[2]) > 100, (
        "the gradient grows on its way back"
    )
    found = rows((tmp_path / "table.txt").read_text(), module.CLIPPINGS)
    assert found["nothing"][1:3] == ["nan", "nan"]
    assert "exploding" in found["nothing"][-1]
    for clipping in module.CLIPPINGS[1:]:
        assert float(found[clipping][2]) < 10, "the loss"
    assert float(found["weight clipping"][0]) < 1e-2 * float(found["nothing"][0])


def test_an_interrupted_run_goes_on_to_the_same_bits(name, example, tmp_path, monkeypatch, capsys):
    module, main = example(name)
    right, calls = module.learn, []

    def interrupted(*arguments):
        calls.append(arguments[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(module, "learn", interrupted)
    with pytest.raises(SystemExit) as error:
        main(*SMALL[name], "--out", tmp_path / "stopped")
    assert error.value.code == 130
    assert "2 of " in capsys.readouterr().err.splitlines()[-1]
    assert len(torch.load(tmp_path / "stopped" / "checkpoint.pt")["results"]) == 2
    with pytest.raises(SystemExit, match="other settings"):
        main(*SMALL[name], "--seed", 5, "--out", tmp_path / "stopped")
    main(*SMALL[name], "--out", tmp_path / "stopped")
    assert "continuing after 2 of" in capsys.readouterr().out
    whole = len(calls) - 3
    main(*SMALL[name], "--out", tmp_path / "whole")
    assert len(calls) - 3 - whole == whole + 2, "the finished ones were not trained again"
    assert (tmp_path / "stopped" / "table.txt").read_text() == (
        tmp_path / "whole" / "table.txt"
    ).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "cuda"), "unknown backend 'cuda'"),
        (("--epochs", 0), "0 is less than 1"),
        (("--out", __file__), "File exists"),
    ],
)
def test_bad_options_are_told_in_one_line(name, options, message, example, capsys):
    _, main = example(name)
    with pytest.raises(SystemExit) as error:
        main(*options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_package_is_named(name, example, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*pip install -e '\.\[demo\]'"):
        example(name)
