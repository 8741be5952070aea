"""The example of the softmax collapse: what it writes, and that an interrupted run continues."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from helpers import assert_is_a_picture


def test_grokking(example, tmp_path, capsys, monkeypatch):
    module, main = example("grokking")
    monkeypatch.setattr(module, "INTERVAL", 2)
    main("--epochs", 4)
    out = capsys.readouterr().out
    assert re.search(
        r"test accuracy: stock \d+\.\d %, ours \d+\.\d %: the collapse does not show$", out.strip()
    )
    assert_is_a_picture(tmp_path / "grokking.png")
    assert sorted(os.listdir(tmp_path)) == ["grokking.png", "weights.pt"]


def test_an_interrupted_run_goes_on_to_the_same_bits(example, tmp_path, capsys, monkeypatch):
    module, main = example("grokking")
    monkeypatch.setattr(module, "INTERVAL", 1)
    main("--epochs", 3)
    whole = torch.load(tmp_path / "weights.pt")
    save, saved = module.save, []

    def interrupting(state, path):
        save(state, path)
        saved.append(state.get("epoch"))
        if saved == [1, 2]:
            raise KeyboardInterrupt

    for writer in (module, sys.modules["common"]):
        monkeypatch.setattr(writer, "save", interrupting)
    with pytest.raises(SystemExit):
        main("--epochs", 3)
    assert "the same command continues" in capsys.readouterr().err
    main("--epochs", 3)
    assert "continuing after epoch 2 of 3" in capsys.readouterr().out
    resumed = torch.load(tmp_path / "weights.pt")
    for model, weights in whole.items():
        for key, value in weights.items():
            assert torch.equal(resumed[model][key], value), (model, key)
