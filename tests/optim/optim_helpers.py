"""Optimizers, parameters and gradients for the tests of ``custom_backprop.optim``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DEVICE
from torch import Tensor
from torch.nn import Parameter

import custom_backprop
from custom_backprop import optim
from custom_backprop.nn.utils import clip_grad_norm_
from custom_backprop.optim.lion import PlainLion

HAS_KERNELS = custom_backprop.backends.why_not("triton", DEVICE) is None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no kernels here")
#: awkward ones: no element, one, a scalar, an odd number, more than one block and more than one
#: piece, rows, another memory layout
SHAPES = [(0,), (1,), (), (7,), (150,), (3, 5), (2, 3, 2, 2)]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    (
        "Adagrad",
        {
            "lr": 0.1,
            "lr_decay": 0.01,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.5,
            "eps": 1e-3,
            "maximize": True,
        },
    ),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.4, "eps": 1e-2, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "eps": 1e-2, "centered": True, "momentum": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adam", {"lr": 0.01, "betas": (0.0, 0.9)}),
    ("AdamW", {"lr": 0.01}),
    (
        "AdamW",
        {
            "lr": 0.01,
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 0.3,
            "amsgrad": True,
            "maximize": True,
        },
    ),
    ("Lion", {"lr": 0.01}),
    ("Lion", {"lr": 0.01, "betas": (0.5, 0.4), "weight_decay": 0.3, "maximize": True}),
]


NAMES = list(dict.fromkeys(name for name, _ in OPTIONS))


#: one set of options for each, with which it has every state
FULL = dict(OPTIONS)


every_option = pytest.mark.parametrize(
    ("name", "kwargs"), OPTIONS, ids=[f"{n}-{'-'.join(list(k)[1:])}" for n, k in OPTIONS]
)


every_optimizer = pytest.mark.parametrize("name", NAMES)


def stock(name: str) -> Any:
    return PlainLion if name == "Lion" else getattr(torch.optim, name)


def ours(name: str) -> Any:
    return getattr(optim, name)


def parameters(
    device: str = "cpu", dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    ]
    return [
        Parameter(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        for t in made
    ]


def give_gradients(params: list[Parameter], step: int, skip: bool = True) -> None:
    """Gradients that depend on the parameters. Now and then a parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
        p.grad = (
            None
            if skip and (step + i) % 11 == 3
            else torch.empty_like(p).copy_(p.detach().sin() + noise)
        )


def train(optimizer: Any, params: list[Parameter], steps: range | int, skip: bool = True) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        give_gradients(params, step, skip)
        optimizer.step()


def assert_equal(mine: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Asserts that parameters or states of optimizers are equal."""
    if isinstance(mine, Tensor):
        mine, theirs = mine.detach(), theirs.detach()
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        scale = (
            theirs.nan_to_num(posinf=1, neginf=1).abs().max().clamp_min(1) if theirs.numel() else 1
        )
        assert torch.allclose(
            mine, theirs.to(mine.device), rtol=0, atol=float(tolerance * scale), equal_nan=True
        )
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key], tolerance)
    elif isinstance(mine, (list, tuple)):
        for a, b in zip(mine, theirs, strict=True):
            assert_equal(a, b, tolerance)
    else:
        assert mine == theirs


def assert_clip_alike(our: Any, their: Any, mine: Any, theirs: Any) -> None:
    """Three steps of ours, which clips to a norm of 0.5, and of torch's after torch's clipping."""
    for step in range(3):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        our.step()
        clip_grad_norm_(theirs, 0.5)
        their.step()
    assert_equal(mine, theirs)
