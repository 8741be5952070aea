"""Rows that have the same bits in every batch: the check, and those of our ops that claim it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional
from custom_backprop.testing import Make, database, validate

CHECK = ["batch_invariance"]
CLAIMED = [spec for spec in database().values() if spec.rows]


def few(sample, rows, count=4):
    """The sample with some of its rows."""
    return [
        a.detach()[:count].requires_grad_(a.requires_grad) if i in rows else a
        for i, a in enumerate(sample.args)
    ]


@pytest.mark.parametrize("spec", CLAIMED, ids=str)
def test_rows_of_our_ops(spec, backend):
    sample = spec.large(Make(DEVICE, torch.float32), "awkward")
    options = {"kwargs": sample.kwargs, "checks": CHECK, "rows": spec.rows}
    if backend == "triton" and DEVICE == "cpu":
        options |= {"dtype": torch.float32, "low_precision": ()}  # slow in the interpreter
    report = validate(spec.function, few(sample, spec.rows), **options)
    assert report.status("batch_invariance") == "right", report


def test_losses_of_rows(backend):
    def losses(x, target):
        return functional.cross_entropy(x, target, reduction="none")

    given = [torch.randn(5, 37, device=DEVICE), torch.tensor([3, 0, 36, 7, 7], device=DEVICE)]
    assert validate(losses, given, checks=CHECK, rows=(0, 1)).ok


class Mixes(torch.autograd.Function):
    """Its backward subtracts the mean over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy - 1e-15 * dy.mean(0)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x / x.shape[0] * x.shape[0], "in a batch of"),  # rounds otherwise
        (lambda x: x + 1e-16 * x.abs().max(), "other bits"),
        (Mixes.apply, "other bits"),
    ],
)
def test_a_row_that_depends_on_the_batch_is_seen(function, found):
    x = torch.rand(7, 5) + 1
    report = validate(function, x, checks=CHECK, rows=(0,), low_precision=(torch.float32,))
    assert report.verdict == "wrong"
    assert found in report.failures[0].detail


def test_what_claims_nothing_or_has_no_rows():
    x = torch.randn(3, 5)
    assert validate(F.softmax, [x, -1], checks=CHECK).status("batch_invariance") == "n/a"
    assert validate(torch.sum, x, checks=CHECK, rows=(0,)).status("batch_invariance") == "n/a"
    assert validate(F.softmax, [x, -1], checks=CHECK, rows=(0,)).ok
    for rows in ((1,), (2,)):
        with pytest.raises(ValueError, match="not a tensor with rows"):
            validate(F.softmax, [x, -1], checks=CHECK, rows=rows)
