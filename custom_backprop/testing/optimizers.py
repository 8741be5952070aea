"""What ``kernels`` compiles and audits for the optimizers: steps on parameters of every dtype, with
every kind of rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .. import optim
from ..backends import use_backend
from .audit import Audit, audit

#: name -> the arguments with which its kernel does the most
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "Lion": {},
}

#: name -> the arguments with which it takes the other branches
OTHERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    "Adagrad": {},
    "RMSprop": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Lion": {},
}

_KINDS: list[tuple[torch.dtype, dict[str, bool]]] = [
    (torch.float64, {}),
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"bf16_stochastic_round": True}),
]


#: shapes for the audit: no multiples of a block, one for several programs, one empty
_SHAPES = [(7, 3), (4099,), (5, 1021), (0,)]


def audit_optimizer(name: str) -> Audit:
    """Audits a second step, after the formula made the states in the first: in float32, float64
    and, with master weights, float16."""
    seen = Audit()
    for dtype, how in [*_KINDS[:2], (torch.float16, {"master_weights": True})]:
        params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in _SHAPES]
        grads = list(map(torch.randn_like, params))
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer = getattr(optim, name)(params, **OPTIMIZERS[name], **how)
        with use_backend("formula"):
            optimizer.step()
        states = [
            t
            for state in optimizer.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor)
        ]
        with use_backend("triton"), audit(*params, *grads, *states) as found:
            optimizer.step()
        seen.launches += found.launches
    return seen


def steps(name: str) -> Iterator[Callable[[], None]]:
    """Calls that take a step of each kind, and two special ones: a step that begins the states, and
    a step with a GradScaler."""
    for dtype, how in _KINDS:
        yield getattr(optim, name)(_params(dtype), **OPTIMIZERS[name], **how).step
    yield partial(
        _two_steps,
        getattr(optim, name)(
            _params(torch.float32), **OTHERS[name], maximize=True, max_grad_norm=1.0
        ),
    )


def _params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = [
        torch.nn.Parameter(torch.empty(1000, 1000, device="meta", dtype=dtype)) for _ in range(3)
    ]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def _two_steps(optimizer: Any) -> None:
    optimizer.step()
    if not optimizer.defaults.get("dampening"):  # with dampening, the host reads it
        optimizer.found_inf = torch.empty((), device="meta")
        optimizer.step()
