"""Stochastic gradient descent. Formula: ``custom_backprop/formulas/optim.py``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .bucket import Bucket
from .optimizer import Group, MultiTensor


class SGD(MultiTensor, torch.optim.SGD):
    """:class:`torch.optim.SGD`, a step for all parameters at once. On a CPU it gives the bits of torch's plain loop over parameters."""

    _torch = torch.optim.SGD
    _states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    _flat: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def _aten(self, bucket: Bucket, grads: list[Tensor], group: Group) -> None:
        lr, weight_decay, momentum = float(group["lr"]), float(group["weight_decay"]), group["momentum"]
        dampening, nesterov, maximize = group["dampening"], group["nesterov"], group["maximize"]
        exact = bucket.dtype in (torch.float32, torch.float64)  # where torch's fused kernel rounds as its loop does
        if exact and not nesterov and (bucket.fresh or not dampening):
            fixed = {"weight_decay": weight_decay, "lr": lr, "dampening": 0.0, "nesterov": False, "maximize": maximize}
            if not momentum:
                torch._fused_sgd_(bucket.flats, grads, [], momentum=0.0, is_first_step=False, **fixed)
            elif bucket.fresh:
                torch._fused_sgd_(bucket.flats, grads, bucket.states["momentum_buffer"], momentum=momentum, is_first_step=True, **fixed)
            else:  # b = (μ b) + d rounds twice in the loop, once in the fused kernel: multiplied apart, with a factor of 1 inside
                for piece in bucket.pieces:
                    piece.homes["momentum_buffer"].mul_(momentum)
                    buffers = piece.states["momentum_buffer"]
                    torch._fused_sgd_(piece.params, piece.list(grads), buffers, momentum=1.0, is_first_step=False, **fixed)
            return
        for piece in bucket.pieces:
            d = piece.flat(grads)
            if maximize:
                d = -d
            if weight_decay:
                d = d.add(piece.flat(bucket.flats), alpha=weight_decay)
            if momentum:
                b = piece.homes["momentum_buffer"]
                if bucket.fresh:
                    b.copy_(d)
                else:
                    b.mul_(momentum).add_(d, alpha=1 - dampening)
                d = d.add(b, alpha=momentum) if nesterov else b
            piece.add_(d, -lr)
