"""Lion, which torch.optim does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..formulas import optim as formulas
from .bucket import Bucket
from .optimizer import Group, MultiTensor
from .pieces import Piece
from .rule import Rule


class PlainLion(Optimizer):
    """Lion, one parameter at a time, as it would be in torch.optim."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]
    ) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step by the formula, which autograd can follow (``differentiable=True``)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                lists: list[list[Tensor]] = [[], [], []]
                self._init_group(group, *lists)
                hyper = {name: group[name] for name in ("lr", "betas", "weight_decay", "maximize")}
                for tensors in zip(*lists, strict=True):
                    p, g, m = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
                    new, state = formulas.lion(p, g, m, **hyper)
                    p.copy_(new)
                    m.copy_(state["exp_avg"])
        return loss


class Lion(MultiTensor, PlainLion):
    """Lion: every element moves by the learning rate in the direction of a sign
    (:func:`custom_backprop.formulas.optim.lion`). It has the three more arguments of
    :mod:`custom_backprop.optim`.

    Args:
        params: parameters or groups of them, as in torch.optim.
        lr: γ; 3 to 10 times smaller than AdamW's.
        betas: β₁ is for the average that gives the step, β₂ for the one that is saved.
        weight_decay: λ, decoupled; larger than AdamW's by the same factor by which γ is smaller.
        maximize: the objective is maximized.
        differentiable: autograd follows the step.

    Raises:
        ValueError: ``lr`` or ``weight_decay`` is negative, or a β is outside [0, 1).
    """

    _torch = PlainLion
    _rule = Rule("lion", formulas.lion, states=("exp_avg",), packed=("exp_avg",))

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
            piece.run_operators(_update, piece, grads, hyper, factor)


def _update(piece: Piece, grads: list[Tensor], hyper: dict[str, Any], factor: float) -> None:
    beta1, beta2 = hyper["betas"]
    d, (out, c) = piece.direction(grads, factor), piece.scratch
    m = piece.whole["exp_avg"]
    torch.lerp(m, d, 1 - beta1, out=c)
    m.lerp_(d, 1 - beta2)
    piece.subtract(torch.sign(c, out=out), hyper["lr"], hyper["weight_decay"])
