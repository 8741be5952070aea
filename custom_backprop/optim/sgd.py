"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor
from .pieces import MANY, Piece
from .rule import Rule
from .threads import by_one_thread

_WIDE = (torch.float32, torch.float64)


class SGD(MultiTensor, torch.optim.SGD):
    """:class:`torch.optim.SGD` with one step for all parameters at once, and three more
    arguments (:mod:`custom_backprop.optim`). The update:
    :func:`custom_backprop.formulas.optim.sgd`.

    On a CPU it gives the same bits as ``torch.optim.SGD(fused=True)``, where μ b + d is rounded
    once. With ``fused=False``, at some cost, it gives those of torch's plain loop over parameters,
    where it is rounded twice. In half precision it always gives those of the loop: torch's fused
    kernel does not change such parameters (pytorch issue 191763).
    """

    _torch = torch.optim.SGD
    _rule = Rule("sgd", formulas.sgd, states=("momentum_buffer",), packed=("momentum_buffer",))

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        momentum, wide = hyper["momentum"], bucket.updated_dtype in _WIDE
        if not wide:
            _loop(bucket, grads, hyper, factor)
        elif not (momentum or hyper["weight_decay"]):
            _without_state(bucket, grads, hyper, factor)
        elif group["fused"] is not False:
            for run, params, d, states in bucket.scaled(grads, factor):
                buffers = states["momentum_buffer"] if momentum else []
                run(torch._fused_sgd_, params, d, buffers, is_first_step=bucket.fresh, **hyper)
        elif factor == 1 and not (momentum and (hyper["dampening"] or hyper["nesterov"])):
            _loop_by_kernel(bucket, grads, hyper)
        else:
            _loop(bucket, grads, hyper, factor)


def _without_state(
    bucket: Bucket, grads: list[Tensor], hyper: dict[str, Any], factor: float
) -> None:
    """θ -= γ g: all of torch's variants give the same bits."""
    alpha = hyper["lr"] if hyper["maximize"] else -hyper["lr"]
    for run, params, d, _ in bucket.scaled(grads, factor):
        if run is by_one_thread and len(params) >= MANY:
            run(torch._fused_sgd_, params, d, [], is_first_step=False, **hyper)
        else:
            torch._foreach_add_(params, d, alpha=alpha)


def _loop_by_kernel(bucket: Bucket, grads: list[Tensor], hyper: dict[str, Any]) -> None:
    """The same bits as torch's loop: computes μ b alone, then the kernel adds d."""
    momentum = hyper["momentum"]
    once = {**hyper, "momentum": 1.0 if momentum else 0.0, "dampening": 0.0}
    for piece in bucket.pieces:
        buffers = piece.states["momentum_buffer"] if momentum else []
        if momentum and not bucket.fresh:
            piece.whole["momentum_buffer"].mul_(momentum)
        piece.run(
            torch._fused_sgd_, piece.params, piece.of(grads), buffers,
            is_first_step=bucket.fresh, **once,
        )  # fmt: skip


def _loop(bucket: Bucket, grads: list[Tensor], hyper: dict[str, Any], factor: float) -> None:
    """The same bits as torch's loop, operator by operator."""
    factor = -factor if hyper["maximize"] else factor
    for piece in bucket.pieces:
        piece.run_operators(_by_operators, piece, bucket, grads, hyper, factor)


def _by_operators(
    piece: Piece, bucket: Bucket, grads: list[Tensor], hyper: dict[str, Any], factor: float
) -> None:
    d, out = piece.direction(grads, factor), piece.scratch[0]
    if decay := hyper["weight_decay"]:
        d = torch.add(d, piece.joined(bucket.updated, 1), alpha=decay, out=out)
    if momentum := hyper["momentum"]:
        b = piece.whole["momentum_buffer"]
        if bucket.fresh:
            b.copy_(d)
        else:
            b.mul_(momentum).add_(d, alpha=1 - hyper["dampening"])
        d = torch.add(d, b, alpha=momentum, out=out) if hyper["nesterov"] else b
    piece.subtract(d, hyper["lr"])
