"""The kernels' elementary functions against torch's in float64: a few units of rounding, everywhere
and at the edges."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE

from custom_backprop.backends import why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.sweep import every_value

if why_not("triton", DEVICE) is not None:
    pytest.skip("kernels do not run here", allow_module_level=True)

import triton.language as tl

kernel = kernels("launch").kernel
elementary = kernels("elementary")

INF, NAN = float("inf"), float("nan")


@kernel
def _apply(X, Y, n, F: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offsets, offsets < n, other=0.0)
    tl.store(Y + offsets, F(x, HALF) if HALF else F(x), offsets < n)


def apply(name, x, half=False):
    y = torch.empty_like(x)
    n, function = x.numel(), getattr(elementary, name)
    _apply.launch(-(-n // 4096), n=n, F=function, HALF=half, BLOCK=4096)(x, y)
    return y


#: name -> (the same in torch, ranges, of the edges those in its domain)
FUNCTIONS = {
    "exp": (torch.exp, [(-1, 1), (-86, 88.7)], [-INF, -1e4, -0.0, 89.5, 1e4, INF, NAN]),
    "exp_minus": (lambda x: torch.exp(-x), [(0, 1), (0, 87)], [0.0, 200.0, INF, NAN]),
    "expm1": (
        torch.expm1,
        [(-1e-4, 1e-4), (-1, 1), (-90, 88.7)],
        [-INF, -200.0, 0.0, 89.5, INF, NAN],
    ),
    "log": (torch.log, [(0.9, 1.1), (0, 1e4)], [-1.0, 0.0, 1e-40, 1.0, INF, NAN]),
    "log1p": (torch.log1p, [(-1e-4, 1e-4), (-1, 1)], [-1.0, 0.0, 1e-30, NAN]),
    "log1p_positive": (torch.log1p, [(0, 1e-4), (0, 1)], [0.0, 1e-30, 1.0, NAN]),
    "sigmoid": (torch.sigmoid, [(-1, 1), (-86, 86)], [-INF, -1e4, 0.0, 1e4, INF, NAN]),
    "softplus": (
        lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
        [(-1, 1), (-86, 86)],
        [-INF, -1e4, 0.0, 1e4, INF, NAN],
    ),
    "tanh": (torch.tanh, [(-1e-4, 1e-4), (-1, 1), (-10, 10)], [-INF, -1e4, 0.0, 1e4, INF, NAN]),
}


@pytest.mark.parametrize(
    ("name", "ends"),
    [(name, ends) for name, (_, ranges, _) in FUNCTIONS.items() for ends in ranges],
    ids=str,
)
def test_units_of_rounding(name, ends):
    low, high = ends
    x = (torch.rand(20_000, dtype=torch.float64) * (high - low) + low).to(DEVICE)
    # NumPy's logarithm of float32, which the interpreter takes, is off by up to 4 units
    allowed = 5 if name in ("log", "log1p") else 3
    for dtype in (torch.float32, torch.float64):
        given = x.to(dtype)
        ours, true = apply(name, given).double(), FUNCTIONS[name][0](given.double())
        error = (ours - true).abs() / (
            torch.finfo(dtype).eps * true.abs().clamp_min(torch.finfo(dtype).tiny)
        )
        assert error.max() <= allowed, f"{dtype}: {error.max():.1f} at {given[error.argmax()]}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges(name):
    reference, _, edges = FUNCTIONS[name]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(edges, dtype=dtype, device=DEVICE)
        torch.testing.assert_close(
            apply(name, x), reference(x.double()).to(dtype), rtol=1e-6, atol=0, equal_nan=True
        )


#: those that half precision has a quicker way for -> (the lowest and the greatest argument)
HALVES = {
    "exp": (-INF, INF),
    "exp_minus": (0, INF),
    "expm1": (-INF, INF),
    "log": (0, INF),
    "log1p": (-1, 0),
    "log1p_positive": (0, 1),
    "softplus": (-INF, INF),
    "tanh": (-INF, INF),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_every_number_of_16_bits(name, dtype):
    """To 2^-15 of the value, as the module says."""
    low, high = HALVES[name]
    x = every_value(dtype, torch.device(DEVICE)).float()
    x = x[(x >= low) & (x <= high) | x.isnan()]
    ours, true = apply(name, x, half=True).double(), FUNCTIONS[name][0](x.double())
    rounded = true.float()
    held = rounded.isfinite() & (true.abs() >= torch.finfo(torch.float32).tiny)
    assert torch.equal(ours.isnan(), true.isnan())
    assert torch.equal(ours[rounded.isinf()], true[rounded.isinf()].float().double())
    error = ((ours - true).abs() / true.abs())[held]
    assert error.max() <= 2**-15, f"{error.max():.1e} at {x[held][error.argmax()]}"
