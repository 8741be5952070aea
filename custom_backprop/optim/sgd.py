"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import MultiTensor


class SGD(MultiTensor, torch.optim.SGD):
    """:class:`torch.optim.SGD`, a step for all parameters at once. On a CPU it gives the bits of torch's plain loop over parameters."""

    _torch = torch.optim.SGD
    _rule = "sgd"
    _formula = formulas.sgd
    _state_names = _slots = _adjacent = ("momentum_buffer",)

    def _aten(self, bucket: Bucket, grads: list[Tensor], hyper: dict[str, Any], factor: float) -> None:
        lr, weight_decay, momentum, maximize = hyper["lr"], hyper["weight_decay"], hyper["momentum"], hyper["maximize"]
        dampening, nesterov = hyper["dampening"], hyper["nesterov"]
        fused = bucket.flats[0].dtype in (torch.float32, torch.float64)  # where torch's fused kernel rounds as its loop does
        if fused and not nesterov and factor == 1 and (bucket.fresh or not momentum or not dampening):
            same = {"weight_decay": weight_decay, "lr": lr, "dampening": 0.0, "nesterov": False, "maximize": maximize}
            if not momentum:
                torch._fused_sgd_(bucket.flats, grads, [], momentum=0.0, is_first_step=False, **same)
            elif bucket.fresh:
                torch._fused_sgd_(bucket.flats, grads, bucket.states["momentum_buffer"], momentum=momentum, is_first_step=True, **same)
            else:  # μ b + d rounds twice in the loop, once in the fused kernel: multiplied apart, it remains to add d
                for piece in bucket.pieces:
                    piece.homes["momentum_buffer"].mul_(momentum)
                    buffers = piece.states["momentum_buffer"]
                    torch._fused_sgd_(piece.params, piece.part(grads), buffers, momentum=1.0, is_first_step=False, **same)
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
