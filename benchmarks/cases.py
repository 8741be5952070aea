"""The calls that are timed: every op of the database at three sizes, forward and forward +
backward, ours and stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from custom_backprop.testing import Make, OpSpec
from custom_backprop.testing.case import is_float, outputs

SIZES = ("small", "medium", "large")
#: on a GPU, in bfloat16: larger than its L2 cache
HUGE = "huge"
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Pair:
    """Ours and stock, on the same inputs. ``prepare`` makes the arguments of one call."""

    ours: Callable[..., Any]
    stock: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]]


class _RestOfNetwork(torch.autograd.Function):
    """A scalar whose gradients with respect to the outputs of a layer are given. It keeps no
    reference to those outputs nor, after backward, to these gradients.

    It is so in a network: when the backward of a layer runs, nothing else refers to its output or
    to the incoming gradient, so both can be freed. The caller of autograd.grad would refer to both.
    """

    @staticmethod
    def forward(ctx: Any, dys: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.dys = dys
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        grads = None, *ctx.dys
        ctx.dys.clear()
        return grads


def pair(spec: OpSpec, size: str, direction: str, device: str = "cpu") -> Pair:
    """Both calls of one op, in float32, or in bfloat16 for the size "huge".

    The gradient of a loss is 1, as in training. Other ops get random gradients, new ones for each
    call.
    """
    sample = spec.large(
        Make(device, torch.bfloat16 if size == HUGE else torch.float32, there=device == "cuda"),
        size,
    )
    sample.kwargs.pop("seed", None)  # drawn at each call, as in training
    if direction == "forward":
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in sample.args)
        return Pair(
            lambda: spec.function(*args, **sample.kwargs),
            lambda: spec.reference(*args, **sample.kwargs),
            tuple,
        )
    leaves = [a for a in sample.args if is_float(a) and a.requires_grad]
    results = outputs(spec.reference(*sample.args, **sample.kwargs))
    dys = [torch.randn_like(y) for y in results]
    scalar = results[0].dim() == 0
    del results

    def step(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: list[torch.Tensor]) -> Any:
            results = outputs(function(*sample.args, **sample.kwargs))
            loss = results[0] if scalar else _RestOfNetwork.apply(*given, *results)
            del results
            return torch.autograd.grad(loss, leaves)

        return run

    return Pair(
        step(spec.function),
        step(spec.reference),
        tuple if scalar else lambda: ([dy.clone() for dy in dys],),
    )
