"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor
from .rule import Rule


class _Adam(MultiTensor):
    _rule = Rule("adam", formulas.adam, states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"))

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        same = {name: hyper[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        beta1, beta2 = hyper["betas"]
        kernel = torch._fused_adamw_ if hyper["decoupled_weight_decay"] else torch._fused_adam_
        for run, params, d, states in bucket.scaled(grads, factor):
            run(
                kernel, params, d, states["exp_avg"], states["exp_avg_sq"],
                states.get("max_exp_avg_sq", []), states["step"], beta1=beta1, beta2=beta2, **same,
            )  # fmt: skip


class Adam(_Adam, torch.optim.Adam):
    """:class:`torch.optim.Adam` with one step for all parameters at once, and three more
    arguments (:mod:`custom_backprop.optim`). The update:
    :func:`custom_backprop.formulas.optim.adam`."""

    _torch = torch.optim.Adam


class AdamW(_Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` with one step for all parameters at once, and three more
    arguments (:mod:`custom_backprop.optim`). The update:
    :func:`custom_backprop.formulas.optim.adam`."""

    _torch = torch.optim.AdamW
