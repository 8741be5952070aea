"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import MANY, Bucket
from .optimizer import Group, MultiTensor
from .threads import by_one_thread


class SGD(MultiTensor, torch.optim.SGD):
    """:class:`torch.optim.SGD`, a step for all parameters at once.

    On a CPU it gives the bits of ``torch.optim.SGD(fused=True)``, where μ b + d is rounded once;
    with ``fused=False``, at some cost, those of torch's plain loop over parameters, where it is
    rounded twice.
    """

    _torch = torch.optim.SGD
    _rule = "sgd"
    _formula = formulas.sgd
    _state_names = _slots = _adjacent = ("momentum_buffer",)

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        lr, weight_decay, momentum, maximize = (
            hyper["lr"],
            hyper["weight_decay"],
            hyper["momentum"],
            hyper["maximize"],
        )
        dampening, nesterov = hyper["dampening"], hyper["nesterov"]
        same: dict[str, Any] = {
            "weight_decay": weight_decay,
            "lr": lr,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        wide = bucket.flats_dtype in (
            torch.float32,
            torch.float64,
        )  # in half precision the kernel's other sums differ too
        if wide and not (momentum or weight_decay):  # all of torch's variants give the same bits
            for run, *lists, _ in bucket.scaled(grads, factor):
                if run is by_one_thread and len(lists[0]) >= MANY:
                    run(
                        torch._fused_sgd_,
                        *lists,
                        [],
                        momentum=0.0,
                        dampening=0.0,
                        is_first_step=False,
                        **same,
                    )
                else:
                    torch._foreach_add_(*lists, alpha=lr if maximize else -lr)
            return
        if group["fused"] is not False:
            for run, *lists, states in bucket.scaled(grads, factor):
                buffers = states["momentum_buffer"] if momentum else []
                run(
                    torch._fused_sgd_,
                    *lists,
                    buffers,
                    momentum=momentum,
                    dampening=dampening,
                    is_first_step=bucket.fresh,
                    **same,
                )
            return
        if wide and factor == 1 and not (momentum and (dampening or nesterov)):
            for piece in bucket.pieces:  # μ b by itself, and then the kernel adds d
                buffers = piece.states["momentum_buffer"] if momentum else []
                if momentum and not bucket.fresh:
                    piece.homes["momentum_buffer"].mul_(momentum)
                once: dict[str, Any] = {
                    "momentum": 1.0 if momentum else 0.0,
                    "dampening": 0.0,
                    "is_first_step": bucket.fresh,
                }
                piece.run(
                    torch._fused_sgd_, piece.params, piece.part(grads), buffers, **once, **same
                )
            return
        for piece in bucket.pieces:
            d, out = piece.joined(grads), piece.scratch[0]
            if factor != 1:
                d = torch.mul(d, factor, out=out)
            if maximize:
                d = torch.neg(d, out=out)
            if weight_decay:
                d = torch.add(d, piece.joined(bucket.flats, 1), alpha=weight_decay, out=out)
            if momentum:
                b = piece.homes["momentum_buffer"]
                if bucket.fresh:
                    b.copy_(d)
                else:
                    b.mul_(momentum).add_(d, alpha=1 - dampening)
                d = torch.add(d, b, alpha=momentum, out=out) if nesterov else b
            piece.subtract(d, lr)
