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


def agree(found, expected, dtype, units, terms=None):
    """Each number to ``units`` roundings of float32 (float64), and that of ``dtype`` at the end.
    One that is a difference has ``terms`` as large as that."""
    eps = EPS[torch.float64 if dtype is torch.float64 else torch.float32]
    for a, b, of in zip(found.flatten().tolist(), expected, terms or expected, strict=True):
        allowed = abs(of) * units * eps + abs(b) * EPS[dtype] + torch.finfo(dtype).tiny
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


def of_distribution(x, q):
    """Σ q (lse - x), p Q - q and lse - x, and how large the terms of the second are."""
    with mp.workdps(150):  # p - q is 50 digits shorter than p
        x, q = [mp.mpf(v) for v in x], [mp.mpf(v) for v in q]
        m, total = max(x), sum(q)
        lse = m + mp.log(sum(mp.exp(v - m) for v in x))
        minus_log = [lse - v for v in x]
        p = [mp.exp(-v) for v in minus_log]
        gradient = [a * total - b for a, b in zip(p, q, strict=True)]
        terms = [a * total + b for a, b in zip(p, q, strict=True)]
        k = x.index(m)  # q_k Q (1 - p_k), and what the others have
        terms[k] = total * (1 - p[k]) + total - q[k]
        return sum(a * b for a, b in zip(q, minus_log, strict=True)), gradient, minus_log, terms


def nearly_one(margin, dtype, rows=3, classes=7):
    """Distributions of which class 2 has everything, or all but e^-margin for the others."""
    q = torch.rand(rows, classes) * torch.exp(torch.tensor(-abs(margin) / 2)) / classes
    q[0] = 0
    q[:, 2] = 1 - (q.sum(1) - q[:, 2])
    return q.to(DEVICE, dtype)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.25}], ids=str)
@pytest.mark.parametrize("form", ["rows", "columns", "gradient in forward"])
def test_cross_entropy_of_probabilities(dtype, options, form, backend):
    s = options.get("label_smoothing", 0.0)
    weight = torch.linspace(0.5, 2, 7).to(DEVICE, dtype) if "weight" in options else None
    for margin in MARGINS:
        x, y = certain(margin, dtype), nearly_one(margin, dtype)
        w = [1.0] * 7 if weight is None else weight.tolist()
        q = [[a * ((1 - s) * b + s / 7) for a, b in zip(w, row, strict=True)] for row in y.tolist()]
        expected = [of_distribution(*pair) for pair in zip(x.tolist(), q, strict=True)]
        losses, gradients, minus_logs, terms = zip(*expected, strict=True)
        if form == "columns":
            x, y = x.t().unsqueeze(0), y.t().unsqueeze(0)
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        if form == "gradient in forward":
            leaves[1].requires_grad_(False)
        reduction = "sum" if form == "gradient in forward" else "none"
        given = {**options, "weight": weight, "reduction": reduction}
        loss = functional.cross_entropy(*leaves, **given)
        wanted = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(loss, wanted, torch.ones_like(loss))
        found = [g.squeeze(0).t() if form == "columns" else g for g in found]
        units = 8 + abs(margin)
        agree(loss.detach(), losses if reduction == "none" else [sum(losses)], dtype, units)
        flat = [[v for row in rows for v in row] for rows in (gradients, terms)]
        agree(found[0], flat[0], dtype, units, flat[1])
        for dy in found[1:]:
            slopes = [a * (1 - s) * v for row in minus_logs for a, v in zip(w, row, strict=True)]
            agree(dy, slopes, dtype, units)


@pytest.mark.parametrize("target", ["probabilities", "classes"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_soft_targets_of_a_wide_row(target, reduction, backend):
    x = certain(20, torch.float32, rows=1, classes=20001).requires_grad_()
    y, s = nearly_one(40, torch.float32, 2, 20001)[1:], 0.0
    given = y
    if target == "classes":
        s, given = 1e-9, torch.tensor([2], device=DEVICE)
        y = torch.full((1, 20001), 1e-9 / 20001, dtype=torch.float64)
        y[0, 2] += 1 - 1e-9
    loss = functional.cross_entropy(x, given, reduction=reduction, label_smoothing=s)
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    value, gradient, _, terms = of_distribution(x.flatten().tolist(), y.flatten().tolist())
    agree(loss.detach(), [value], torch.float32, 40)
    agree(dx, gradient, torch.float32, 40, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_cross_entropy_of_probabilities(dtype, backend):
    for margin in (1, 18, 60):
        z, y = certain(margin, dtype), nearly_one(margin, dtype)
        expected = [of_distribution(*pair) for pair in zip(z.tolist(), y.tolist(), strict=True)]
        w, y = z.t().contiguous().requires_grad_(), y.requires_grad_()
        x = torch.eye(3, dtype=dtype, device=DEVICE)  # so that the weight is the logits
        loss = functional.linear_cross_entropy(x, w, y, reduction="sum")
        dw, dy = torch.autograd.grad(loss, (w, y))
        losses, gradients, minus_logs, terms = zip(*expected, strict=True)
        units = 8 + margin
        agree(loss.detach(), [sum(losses)], dtype, units)
        flat = [[v for row in rows for v in row] for rows in (gradients, minus_logs, terms)]
        agree(dw.t(), flat[0], dtype, units, flat[2])
        agree(dy, flat[1], dtype, units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("among", ["keys", "both", "negatives"])
def test_info_nce(dtype, among, backend):
    """Queries of which each picks a component, so that the scores are what they are given as, and
    the keys' gradient is that of the scores."""
    for margin in (-20, 1, 14, 18, 40, 60):
        s = torch.randn(4, 4 if among != "negatives" else 5, dtype=dtype)
        t = torch.arange(4) if among != "negatives" else torch.zeros(4, dtype=torch.int64)
        s[torch.arange(4), t] = s.abs().amax() + margin
        s = s.to(DEVICE)
        q = torch.eye(4, dtype=dtype, device=DEVICE)
        if among == "negatives":
            given = [(q * s[:, :1]).requires_grad_(), s[:, 1:].t().contiguous().requires_grad_()]
        else:
            given = [s.t().contiguous().requires_grad_()]
        loss = functional.info_nce(
            q, *given, temperature=0.5, symmetric=among == "both", normalize=False, reduction="sum"
        )
        grads = torch.autograd.grad(loss, given)
        G = grads[0].t()
        if among == "negatives":
            G = torch.cat([grads[0].diagonal().unsqueeze(1), grads[1].t()], 1)
        rows = [
            [loss_and_gradient([2 * v for v in row], int(i)) for i, row in zip(t, of, strict=True)]
            for of in (s.tolist(), s.t().tolist())[: 1 + (among == "both")]
        ]
        losses = [sum(value for value, _ in of) for of in rows]
        slopes = [[g for _, g in of] for of in rows]
        if among == "both":
            columns = [list(c) for c in zip(*slopes[1], strict=True)]
            slopes[0] = [
                [(a + b) / 2 for a, b in zip(*pair, strict=True)]
                for pair in zip(slopes[0], columns, strict=True)
            ]
        units = 16 + 2 * abs(margin)  # scores differ by more than the margin
        agree(loss.detach(), [sum(losses) / len(losses)], dtype, units)
        agree(G, [2 * g for row in slopes[0] for g in row], dtype, units)


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
