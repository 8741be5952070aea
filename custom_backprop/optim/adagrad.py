"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor


class Adagrad(MultiTensor, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad`, a step for all parameters at once."""

    _torch = torch.optim.Adagrad
    _rule = "adagrad"
    _formula = formulas.adagrad
    _state_names = ("sum", "step")
    _slots = ("sum",)

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        for run, params, d, states in bucket.scaled(grads, factor):
            run(
                torch._fused_adagrad_, params, d, states["sum"], states["step"], lr=hyper["lr"], lr_decay=hyper["lr_decay"],
                weight_decay=hyper["weight_decay"], eps=hyper["eps"], maximize=hyper["maximize"],
            )  # fmt: skip
