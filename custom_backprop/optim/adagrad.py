"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor
from .rule import Rule


class Adagrad(MultiTensor, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad` with one step for all parameters at once, and three more
    arguments (:mod:`custom_backprop.optim`). The update:
    :func:`custom_backprop.formulas.optim.adagrad`."""

    _torch = torch.optim.Adagrad
    _rule = Rule("adagrad", formulas.adagrad, states=("sum", "step"))

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        for run, params, d, states in bucket.scaled(grads, factor):
            run(torch._fused_adagrad_, params, d, states["sum"], states["step"], **hyper)
