"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor
from .pieces import Piece
from .rule import Rule

_STATES = ("square_avg", "momentum_buffer", "grad_avg")


class RMSprop(MultiTensor, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop` with one step for all parameters at once, and three more
    arguments (:mod:`custom_backprop.optim`). The update:
    :func:`custom_backprop.formulas.optim.rmsprop`."""

    _torch = torch.optim.RMSprop
    _rule = Rule("rmsprop", formulas.rmsprop, states=(*_STATES, "step"), packed=_STATES)

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        factor = -factor if hyper["maximize"] else factor
        for piece in bucket.pieces:
            piece.run_operators(_update, piece, bucket.updated, grads, hyper, factor)


def _update(
    piece: Piece, params: list[Tensor], grads: list[Tensor], hyper: dict[str, Any], factor: float
) -> None:
    lr, eps, momentum, alpha = hyper["lr"], hyper["eps"], hyper["momentum"], hyper["alpha"]
    d, (out, root) = piece.direction(grads, factor), piece.scratch
    if decay := hyper["weight_decay"]:
        d = torch.add(d, piece.joined(params, 1), alpha=decay, out=out)
    v = piece.whole["square_avg"].mul_(alpha).addcmul_(d, d, value=1 - alpha)
    if hyper["centered"]:
        a = piece.whole["grad_avg"].lerp_(d, 1 - alpha)
        torch.addcmul(v, a, a, value=-1, out=root).sqrt_().add_(eps)
    else:
        torch.sqrt(v, out=root).add_(eps)
    if momentum > 0:
        piece.subtract(piece.whole["momentum_buffer"].mul_(momentum).addcdiv_(d, root), lr)
    else:
        piece.subtract(torch.div(d, root, out=out), lr)
