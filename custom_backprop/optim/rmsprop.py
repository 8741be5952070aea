"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor


class RMSprop(MultiTensor, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`, a step for all parameters at once."""

    _torch = torch.optim.RMSprop
    _rule = "rmsprop"
    _formula = formulas.rmsprop
    _state_names = ("square_avg", "momentum_buffer", "grad_avg", "step")
    _slots = _adjacent = ("square_avg", "momentum_buffer", "grad_avg")

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        lr, alpha, weight_decay, momentum = (
            hyper["lr"],
            hyper["alpha"],
            hyper["weight_decay"],
            hyper["momentum"],
        )
        factor = -factor if hyper["maximize"] else factor
        for piece in bucket.pieces:
            d, (out, root) = piece.joined(grads), piece.scratch
            if factor != 1:
                d = torch.mul(d, factor, out=out)
            if weight_decay:
                d = torch.add(d, piece.joined(bucket.flats, 1), alpha=weight_decay, out=out)
            v = piece.homes["square_avg"].mul_(alpha).addcmul_(d, d, value=1 - alpha)
            if hyper["centered"]:
                a = piece.homes["grad_avg"].lerp_(d, 1 - alpha)
                torch.addcmul(v, a, a, value=-1, out=root).sqrt_().add_(hyper["eps"])
            else:
                torch.sqrt(v, out=root).add_(hyper["eps"])
            if momentum > 0:
                piece.subtract(piece.homes["momentum_buffer"].mul_(momentum).addcdiv_(d, root), lr)
            else:
                piece.subtract(torch.div(d, root, out=out), lr)
