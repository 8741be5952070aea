"""The character-level GPT, in small: it trains, goes on after an interruption, and is compared with
its stock twin."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from helpers import assert_is_a_picture

SMALL = {
    "DIM": 16, "HEADS": 2, "HIDDEN": 24, "LAYERS": 2, "CONTEXT": 16, "BATCH": 4, "EPOCH": 10,
    "WARMUP": 2, "VALIDATION": 4, "SAMPLE": 20,
}  # fmt: skip
TEXT = "To be, or not to be, that is the question. " * 40


@pytest.fixture
def small(example, monkeypatch, tmp_path):
    """The example, its main() with the text, and the folder of its results."""
    module, main = example("char_gpt")
    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    file, folder = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(TEXT)
    return module, lambda *own: main("--text", file, "--out", folder, "--threads", 1, *own), folder


def loss_of(printed):
    return float(re.search(r"^validation loss: (\S+) nats per character$", printed, re.M)[1])


def test_it_learns(small, capsys):
    _, main, folder = small
    main("--epochs", 8)
    told = capsys.readouterr()
    assert loss_of(told.out) < 1.5, "e^1.5 of 16 characters are left to choose from"
    assert "1548 characters for training, 16 different ones" in told.out
    sample = told.out.split("a sample:\n")[1]
    assert len(sample.split("\n\n")[0]) == SMALL["SAMPLE"]
    assert "80/80" in told.err, "no progress bar"
    assert_is_a_picture(folder / "char_gpt.png")
    assert sorted(os.listdir(folder)) == ["char_gpt.png", "weights.pt"], (
        "a finished run leaves no checkpoint"
    )


def test_the_text_inside_python_is_the_default(example):
    module, _ = example("char_gpt")
    text = module.Text(module.Namespace(text=None, device="cpu"))
    assert len(text.training) > 300_000
    assert text.validation.shape == (module.VALIDATION, module.CONTEXT + 1)
    assert "statement" in text.read(text.training[:1000])
    x, target = text.batch(torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1:], target[:, :-1]), "the same window, one character later"
    assert len({text.read(row) for row in x}) > 1


def test_the_twin_computes_the_same(small):
    """In float64, from the same weights: loss, gradients, and three steps."""
    module, _, _ = small
    args = module.Namespace(seed=0, device="cpu", epochs=1, recompute=True)
    ours, stock = (module.Learner(parts, 20, args) for parts in (module.Ours, module.Stock))
    stock.model.load_state_dict(ours.model.state_dict())
    x, target = torch.randint(20, (2, 3, 16))
    for learner in (ours, stock):
        learner.model.double()
        for m in learner.model.modules():
            if isinstance(m, module.StockRotary):  # its tables are rounded to float32
                m.cos, m.sin = ours.model.blocks[0].rotary.cos, ours.model.blocks[0].rotary.sin
    torch.testing.assert_close(ours.model(x, target), stock.model(x, target))
    for _ in range(3):
        torch.testing.assert_close(ours.step(x, target), stock.step(x, target))
    torch.testing.assert_close(ours.model.state_dict(), stock.model.state_dict())


def test_compare(small, capsys):
    _, main, folder = small
    main("--epochs", 2, "--compare")
    out = capsys.readouterr().out
    told = re.search(
        r"^ours / stock: time of a step (\S+), peak memory of a step (\S+); "
        r"difference of validation losses (\S+)$",
        out,
        re.M,
    )
    assert float(told[2]) < 1
    assert abs(float(told[3])) < 0.01
    weights = torch.load(folder / "weights.pt")
    torch.testing.assert_close(weights["ours"], weights["stock"], rtol=0, atol=0.02)
    assert_is_a_picture(folder / "char_gpt.png")


def test_recompute_takes_less_memory_and_changes_no_bit(small, capsys):
    _, main, folder = small
    found = []
    for own in ((), ("--recompute",)):
        main("--epochs", 1, "--compare", *own)
        ratio = re.search(r"peak memory of a step (\S+);", capsys.readouterr().out)[1]
        found.append((float(ratio), torch.load(folder / "weights.pt")["ours"]))
    assert found[1][0] < found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def test_an_interrupted_run_goes_on_to_the_same_bits(small, capsys, monkeypatch):
    module, main, folder = small
    main("--epochs", 3, "--compare")
    whole = torch.load(folder / "weights.pt")
    save, saved = module.save, []

    def interrupting(state, path):
        save(state, path)
        saved.append(state.get("epoch"))
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["common"], "save", interrupting)
    with pytest.raises(SystemExit) as error:
        main("--epochs", 3, "--compare")
    assert error.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    main("--epochs", 3, "--compare")
    assert "continuing after epoch 2 of 3" in capsys.readouterr().out
    torch.testing.assert_close(torch.load(folder / "weights.pt"), whole, rtol=0, atol=0)


def test_a_checkpoint_of_another_text_is_refused(small, monkeypatch, tmp_path):
    module, main, _ = small
    monkeypatch.setattr(module, "draw", lambda *args: sys.exit("drawn"))  # the checkpoint stays
    with pytest.raises(SystemExit, match="drawn"):
        main("--epochs", 1)
    with pytest.raises(SystemExit, match="drawn"):
        main("--epochs", 1)
    (tmp_path / "text.txt").write_text(TEXT.upper())
    with pytest.raises(SystemExit, match="other settings"):
        main("--epochs", 1)


def test_texts_that_cannot_be_used(small, tmp_path):
    _, main, _ = small
    with pytest.raises(SystemExit, match=r"cannot read .*none"):
        main("--text", tmp_path / "none")
    (tmp_path / "short").write_text("too short")
    with pytest.raises(SystemExit, match="a text of 9 characters is too short"):
        main("--text", tmp_path / "short")
