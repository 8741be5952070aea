"""Losses and gradients keep their digits where a network is certain. Truth is computed with 50
digits from the numbers that the op is given."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from mpmath import mp

from custom_backprop import functional

mp.dps = 50
EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
MARGINS = (-100, -20, -1, 0, 1, 5, 14, 18, 40, 60, 100)
each_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)


def agree(found, expected, dtype, units):
    """Each number to ``units`` roundings of float32 (float64), and that of ``dtype`` at the end."""
    eps = EPS[torch.float64 if dtype is torch.float64 else torch.float32]
    for a, b in zip(found.flatten().tolist(), expected, strict=True):
        allowed = abs(b) * (units * eps + EPS[dtype]) + torch.finfo(dtype).tiny
        assert abs(a - b) <= allowed, (a, mp.nstr(b))


def certain(margin, dtype, rows=3, classes=7):
    """Rows of logits, in each of which class 2 leads by ``margin``."""
    x = torch.randn(rows, classes)
    x[:, 2] = -torch.inf
    x[:, 2] = x.amax(1) + margin
    return x.to(DEVICE, dtype)


def loss_and_gradient(x, t):
    """-log p_t, and p_c - [c = t]."""
    x = [mp.mpf(v) for v in x]
    e = [mp.exp(v - x[t]) for v in x]
    others = sum(v for c, v in enumerate(e) if c != t)
    gradient = [v / (1 + others) for v in e]
    gradient[t] = -others / (1 + others)
    return mp.log1p(others), gradient


@each_dtype
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("inner", [False, True])
def test_cross_entropy(dtype, reduction, inner, backend):
    for margin in MARGINS:
        x = certain(margin, dtype)
        losses, gradients = zip(*(loss_and_gradient(row, 2) for row in x.tolist()), strict=True)
        target = torch.full((3,), 2, device=DEVICE)
        given, t = (x.t().unsqueeze(0), target.unsqueeze(0)) if inner else (x, target)
        given = given.detach().requires_grad_()
        loss = functional.cross_entropy(given, t, reduction=reduction)
        (dx,) = torch.autograd.grad(loss, given, torch.ones_like(loss))
        count = 3 if reduction == "mean" else 1
        units = 8 + abs(margin)  # of the differences of logits, and of their exponentials
        agree(loss.detach(), losses if reduction == "none" else [sum(losses) / count], dtype, units)
        dx = dx.squeeze(0).t() if inner else dx
        agree(dx, [g / count for row in gradients for g in row], dtype, units)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_of_a_wide_row(reduction, backend):
    """Which a kernel reads in a loop."""
    x = certain(20, torch.float32, rows=1, classes=20001).requires_grad_()
    loss = functional.cross_entropy(x, torch.tensor([2], device=DEVICE), reduction=reduction)
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    expected, gradient = loss_and_gradient(x.flatten().tolist(), 2)
    agree(loss.detach(), [expected], torch.float32, 40)
    agree(dx, gradient, torch.float32, 40)
