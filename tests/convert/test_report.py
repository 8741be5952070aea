"""What the report of a conversion says that a step saves, against what one does save."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from twins import small

import custom_backprop
from custom_backprop.cost import cost
from custom_backprop.cost.report import OUTSIDE
from custom_backprop.testing import peak_memory


def held(call):
    """Bytes of tensors that live as long as what a call returns."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    del result
    return sum(events)


@pytest.mark.parametrize("fused_loss", [True, False])
def test_the_report_is_what_training_saves(fused_loss, fused, monkeypatch):
    stock = small("llama", vocab_size=512)
    ours = custom_backprop.convert(copy.deepcopy(stock), functions=fused_loss)
    ids = torch.randint(512, (4, 64))
    inputs = {"input_ids": ids, "labels": ids}
    report = custom_backprop.conversion_report(ours, **inputs)
    (loss,) = report.losses
    tokens, width = ids.numel(), stock.config.hidden_size
    logits, weight = 4 * tokens * 512, 4 * 512 * width
    assert logits < loss.saved_before < 1.01 * logits
    if fused_loss:
        assert loss.ours == "custom_backprop.linear_cross_entropy"
        assert weight + 4 * tokens * width < loss.saved < 1.1 * (weight + 4 * tokens * width)
    else:
        assert (loss.ours, loss.reason) == (None, "functions are torch's")
        assert loss.saved == loss.saved_before
    rows = [*report.layers, *report.losses]
    sums = [sum(getattr(x, which) or 0 for x in rows) for which in ("saved_before", "saved")]
    loss_itself = 4
    for model, saved in zip((stock, ours), sums, strict=True):
        model(**inputs)  # caches what it needs once
        found = held(lambda model=model: model(**inputs).loss)
        assert found == saved - ids.nbytes + loss_itself, "the embedding saves the ids, too"
    peaks = [peak_memory(lambda m=m: m(**inputs).loss.backward()) for m in (stock, ours)]
    assert peaks[0] - peaks[1] >= sums[0] - sums[1]
    lines = str(report).splitlines()
    (line,) = [line.split() for line in lines if "cross_entropy()" in line]
    assert line[:3] == ["1", "cross_entropy()", "function"]
    assert line[-2:] == [f"{n / 1024:.1f}" for n in (loss.saved, loss.saved_before)]
    assert f" {sums[1] / 1024:.1f} " in next(line for line in lines if "total" in line)


def test_a_loss_outside_the_model_costs_what_it_does_in_training(fused):
    model, ids = small("llama", vocab_size=512), torch.randint(512, (2, 64))

    def loss(output):
        return F.cross_entropy(output.logits.view(-1, 512), ids.view(-1))

    found = cost(model, ids, loss=loss)
    logits = 4 * ids.numel() * 512
    assert found.stock[OUTSIDE].saved_bytes > logits
    assert found.ours[OUTSIDE].saved_bytes < logits
    assert found.ours.total.backward_flops < found.stock.total.backward_flops, "made in forward"
    assert type(model) is type(small("llama"))
