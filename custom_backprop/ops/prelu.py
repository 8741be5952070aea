"""Autograd of the parametric ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import prelu as primitives
from ..formulas import prelu as formula
from .function import differentiable, differentiated, wanted


def check(x: Tensor, weight: Tensor) -> None:
    """Raises what stock raises for what is no tensor, and for shapes and dtypes that do not fit."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        raise TypeError(
            f"prelu: input and weight must be Tensors, not {type(x).__name__} and {type(weight).__name__}"
        )
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"prelu: input and weight must have the same dtype, got {x.dtype} and {weight.dtype}"
        )
    if weight.dim() > 1 or (
        weight.numel() != 1
        and (x.dim() == 0 or weight.numel() != (x.shape[1] if x.dim() > 1 else 1))
    ):
        raise RuntimeError(
            f"prelu: the weight must have one element, or be 1-D with one for each channel (dimension 1) of the input: "
            f"got a weight of shape {tuple(weight.shape)} for an input of shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise NotImplementedError(f"prelu is not implemented for {x.dtype}")


class PReLU:
    """y = x [x > 0] + w x [x <= 0];  dx = dy ([x > 0] + w [x <= 0]), dw_c = Σ dy x [x <= 0]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        check(x, weight)
        return primitives.forward(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None
        x, weight = ctx.saved_tensors
        run = formula.prelu_backward if differentiated() else primitives.backward
        return wanted(ctx.needs_input_grad, run(dy, x, weight, *ctx.needs_input_grad))

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        return formula.prelu_jvp(x, weight, tx, tw)


prelu = differentiable(autocast_cpu="lower", autocast_cuda="lower")(PReLU)
