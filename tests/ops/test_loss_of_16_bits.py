"""Losses of every 16-bit number, beside several of the other operands: value and gradients are as
near to the formula in float64 as stock's are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as stock
from helpers import DEVICE

from custom_backprop import functional, use_backend
from custom_backprop.backends import interpreting, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.checks.precision import HAIR
from custom_backprop.testing.sweep import every_value, units_off, worst_by_binade

if why_not("triton", DEVICE) is not None:
    pytest.skip("kernels do not run here", allow_module_level=True)

INF, NAN = float("inf"), float("nan")

#: probabilities: 0, a subnormal of bfloat16 and one of both, next to a half and to 1
PROBABILITIES = [0.0, 1e-39, 3e-6, 0.3, 0.49, 0.5, 0.9961, 0.9995, 1.0]
NUMBERS = [-INF, -300.0, -1.0, -1e-3, 0.0, 3e-6, 0.7, 2.0, 90.0, INF, NAN]


def between_0_and_1(x):
    return x[(x >= 0) & (x <= 1)]


def not_negative(x):
    return x[(x >= 0) | x.isnan()]


def every(x):
    return x


def not_tiny(x):
    """Below, e^x is 1 but for its rounding, which is all that a difference leaves of it."""
    return x[(x.abs() >= 2**-20) | (x == 0) | x.isnan()]


#: loss, which operand takes every value, of which domain, the others' values, options
CASES = [
    ("binary_cross_entropy", 0, between_0_and_1, [PROBABILITIES], {}),
    ("binary_cross_entropy", 1, between_0_and_1, [PROBABILITIES], {}),
    ("binary_cross_entropy_with_logits", 0, not_tiny, [PROBABILITIES], {}),
    ("binary_cross_entropy_with_logits", 1, between_0_and_1, [NUMBERS], {}),
    ("kl_div", 0, every, [PROBABILITIES], {}),
    ("kl_div", 1, not_negative, [NUMBERS], {}),
    ("kl_div", 0, every, [NUMBERS], {"log_target": True}),
    ("kl_div", 1, every, [NUMBERS], {"log_target": True}),
    ("gaussian_nll_loss", 0, every, [[0.0, -2.0, INF], [1e-6, 0.3, 0.9961, 1.0, 70.0]], {}),
    ("gaussian_nll_loss", 2, not_negative, [[0.0, -3e-3, 1.0, 40.0], [0.0, 0.5]], {"full": True}),
    ("poisson_nll_loss", 0, not_tiny, [[0.0, 1.0, 2.0, 70.0]], {"full": True}),
    ("poisson_nll_loss", 0, not_negative, [[0.0, 1.0, 2.0, 70.0]], {"log_input": False}),
    ("poisson_nll_loss", 1, not_negative, [[-3.0, 0.0, 0.5]], {"full": True}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_half(monkeypatch):
    """The interpreter computes in float32 copies of bfloat16, which would take float32's way."""
    if interpreting():
        monkeypatch.setattr(kernels("loss"), "half", lambda X: True)


def value_and_gradients(module, name, operands, options):
    leaves = [t.clone().requires_grad_() for t in operands]
    loss = getattr(module, name)(*leaves, reduction="none", **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]


def others(values, dtype):
    """Each of the first with each of the second, in a column."""
    given = [torch.tensor(v, device=DEVICE).to(dtype) for v in values]
    return [t.reshape(-1, 1) for t in torch.meshgrid(*given, indexing="ij")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "which", "domain", "values", "options"), CASES)
def test_every_number_is_as_near_as_stocks(name, which, domain, values, options, dtype):
    swept = domain(every_value(dtype, DEVICE))
    operands = others(values, dtype)
    operands.insert(which, swept[None])
    operands = [t.clone() for t in torch.broadcast_tensors(*operands)]
    with use_backend("formula"):
        truth = value_and_gradients(functional, name, [t.double() for t in operands], options)
    theirs = value_and_gradients(stock, name, operands, options)
    with use_backend("triton"):
        ours = value_and_gradients(functional, name, operands, options)
    for what, our, their, true in zip(("value", 0, 1, 2), ours, theirs, truth, strict=False):
        judged = their.isfinite() & true.isfinite()
        off, limit = (torch.where(judged, units_off(found, true), 0.0) for found in (our, their))
        for beside, row in enumerate(off - torch.stack([worst_by_binade(swept, e) for e in limit])):
            at = row.argmax()
            assert row[at] <= HAIR, (
                f"{what} at {swept[at].item()!r} beside no. {beside}: "
                f"{our[beside, at].item()!r}, {off[beside, at]:.3g} units off"
            )
