"""The example of convert(): equal losses in less memory, and what it says where something lacks."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from helpers import assert_is_a_picture

NAMES = ("Llama", "BERT", "ViT")


def test_convert_model(example, tmp_path, capsys):
    pytest.importorskip("transformers")
    _, main = example("convert_model")
    main("--steps", 3)
    out = capsys.readouterr().out
    row = r"^(Llama|BERT|ViT) +(stock|converted) +\S+ +\S+ +(\S+)$"
    found = {(name, side): float(memory) for name, side, memory in re.findall(row, out, re.M)}
    assert set(found) == {(name, side) for name in NAMES for side in ("stock", "converted")}
    for name in NAMES:
        assert found[name, "converted"] <= found[name, "stock"]
    assert found["Llama", "converted"] < 0.75 * found["Llama", "stock"]
    assert "losses differ by at most" in out
    assert_is_a_picture(tmp_path / "convert_model.png")


def test_convert_model_fails_where_losses_differ(example, monkeypatch):
    pytest.importorskip("transformers")
    module, main = example("convert_model")
    right = module.models
    monkeypatch.setattr(module, "models", lambda seed: {"ViT": right(seed)["ViT"]})
    monkeypatch.setattr(module.custom_backprop, "convert", perturbed)
    with pytest.raises(SystemExit, match="differ by more than"):
        main("--steps", 1)


def perturbed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    return model


def test_convert_model_says_what_it_needs(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[demo,hf\]'"):
        example("convert_model")
