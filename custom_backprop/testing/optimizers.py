"""What ``kernels`` compiles of the optimizers: steps on meta parameters, in every dtype and way to round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import optim

#: name -> the arguments under which its kernel does the most
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "Lion": {},
}

_KINDS: list[tuple[torch.dtype, dict[str, bool]]] = [
    (torch.float64, {}),
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"bf16_stochastic_round": True}),
]


def steps(name: str) -> Iterator[Callable[[], None]]:
    """Calls that make one step each."""
    for dtype, how in _KINDS:
        params = [torch.nn.Parameter(torch.empty(1000, 1000, device="meta", dtype=dtype)) for _ in range(3)]
        for p in params:
            p.grad = torch.empty_like(p)
        yield getattr(optim, name)(params, **OPTIMIZERS[name], **how).step
