"""Losses and gradients keep their digits where a network is certain. Truth is computed with 50
digits from the numbers that the op is given."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from mpmath import mp

from custom_backprop import functional, use_backend
from custom_backprop.backends import BACKENDS, why_not

mp.dps = 50
EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
MARGINS = (-100, -20, -1, 0, 1, 5, 14, 18, 40, 60, 100)
#: formula and kernels; ATen's operators for these cancel, and an exact form would cost a pass
exactly = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b != "aten" and why_not(b, DEVICE) is None]
)
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


POINTS = (0.0, *(s * v for s in (1, -1) for v in (0.3, 1, 2.5, 5, 8, 12, 15, 17, 20, 40, 87, 100)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pos_weight", [None, 2.5])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_binary_cross_entropy_with_logits(dtype, pos_weight, reduction, backend):
    p = 1 if pos_weight is None else pos_weight
    options = (
        {} if pos_weight is None else {"pos_weight": torch.tensor(p, dtype=dtype, device=DEVICE)}
    )
    for t in (0.0, 1.0, 0.25):
        points = [v for v in POINTS if t in (0, 1) or abs(v) > 5]  # dx is 0 at a point between
        x = torch.tensor(points, dtype=dtype, device=DEVICE, requires_grad=True)
        loss = functional.binary_cross_entropy_with_logits(
            x, torch.full_like(x, t), reduction=reduction, **options
        )
        (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        e = [mp.exp(mp.mpf(v)) for v in x.tolist()]
        losses = [p * t * mp.log1p(1 / v) + (1 - t) * mp.log1p(v) for v in e]
        expected = [(1 - t) * v / (1 + v) - p * t / (1 + v) for v in e]
        agree(loss.detach(), losses if reduction == "none" else [sum(losses)], dtype, 8)
        agree(dx, expected, dtype, 8)


def _gelu(x):
    """Φ(x), and φ(x)."""
    return mp.erfc(-x / mp.sqrt(2)) / 2, mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi)


def _gelu_tanh(x):
    k = 2 * mp.sqrt(2 / mp.pi)
    cubic = mp.mpf(0.044715)
    s = 1 / (1 + mp.exp(-k * (x + cubic * x**3)))
    rest = 1 / (1 + mp.exp(k * (x + cubic * x**3)))
    return s, s * rest * k * (1 + 3 * cubic * x * x)


def _silu(x):
    return 1 / (1 + mp.exp(-x)), 1 / ((1 + mp.exp(-x)) * (1 + mp.exp(x)))


#: y = x g(x): (g, g') with 50 digits, and the options of the call
FACTORS = {
    "gelu": (_gelu, {}),
    "gelu_tanh": (_gelu_tanh, {"approximate": "tanh"}),
    "silu": (_silu, {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FACTORS)
@exactly
def test_activations(name, dtype, backend):
    factors, options = FACTORS[name]
    x = torch.tensor(POINTS, dtype=dtype, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        y = getattr(functional, name.removesuffix("_tanh"))(x, **options)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for i, v in enumerate(map(mp.mpf, x.tolist())):
        g, slope = factors(v)
        # the rounding of an exponent of v²/2, or of 0.07 v³
        units = 8 + 2 * v * v if name == "gelu" else 8 + abs(v) ** 3
        if name == "gelu" and backend == "triton" and dtype == torch.float64:
            units += 1000  # see normal_tail
        agree(y[i].detach(), [v * g], dtype, units)
        agree(dx[i], [g + v * slope], dtype, units)


def _softmaxes(x, dy):
    """dx of softmax and of log_softmax."""
    largest = max(x)
    e = [mp.exp(mp.mpf(v) - largest) for v in x]
    z, dy = sum(e), [mp.mpf(v) for v in dy]
    p = [v / z for v in e]
    mean, total = sum(q * d for q, d in zip(p, dy, strict=True)), sum(dy)
    return {
        "softmax": [q * (d - mean) for q, d in zip(p, dy, strict=True)],
        "log_softmax": [d - q * total for q, d in zip(p, dy, strict=True)],
    }


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("classes", [7, 20001])
@exactly
def test_softmaxes(name, classes, backend):
    """The gradient of a row of which one element is nearly 1; a long one is read in a loop."""
    for dtype in (torch.float32, torch.float64) if classes == 7 else (torch.float32,):
        for margin in (5, 15, 30, 60) if classes == 7 else (15,):
            rows = 2 if classes == 7 else 1
            x = certain(margin, dtype, rows, classes).requires_grad_()
            dy = torch.randn(x.shape, dtype=dtype).to(DEVICE)
            if name == "log_softmax":  # of an nll_loss
                dy[0, torch.arange(classes, device=DEVICE) != 2] = 0
            with use_backend(backend):
                (dx,) = torch.autograd.grad(getattr(functional, name)(x, 1), x, dy)
            for row, given, found in zip(x.tolist(), dy.tolist(), dx, strict=True):
                agree(found, _softmaxes(row, given)[name], dtype, 64 + margin)
