"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor


class _Adam(MultiTensor):
    _rule = "adam"
    _formula = formulas.adam
    _state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    _slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        beta1, beta2 = hyper["betas"]
        kernel = torch._fused_adamw_ if hyper["decoupled_weight_decay"] else torch._fused_adam_
        for run, params, d, states in bucket.scaled(grads, factor):
            run(
                kernel, params, d, states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq", []), states["step"],
                amsgrad=hyper["amsgrad"], lr=hyper["lr"], beta1=beta1, beta2=beta2, weight_decay=hyper["weight_decay"], eps=hyper["eps"],
                maximize=hyper["maximize"],
            )  # fmt: skip


class Adam(_Adam, torch.optim.Adam):
    """:class:`torch.optim.Adam`, a step for all parameters at once."""

    _torch = torch.optim.Adam


class AdamW(_Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, a step for all parameters at once."""

    _torch = torch.optim.AdamW
