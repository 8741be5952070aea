"""Autograd of the pointwise losses: dx = dy w l_x, dt = dy w l_t, dv = dy w l_v, dw = dy l, with dy
/ n in the place of dy for a mean.

Where the loss is one number, forward already produces dx for dy = 1 (see ``held.py``); the other
gradients are made in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.library import is_batched
from ..backends.loss import ATEN, primitives
from ..formulas.loss import LOSSES, NONE, Loss
from .function import differentiable, differentiated, wanted
from .held import holds, release, release_by_kernels, release_directly


def _definition(loss: Loss) -> type:
    run_forward, run_backward = primitives[loss.name]
    aten_forward, _ = ATEN[loss.name]
    no_gradients = (None,) * (2 + len(loss.parameters))

    class Definition:
        @staticmethod
        def forward(
            x: Tensor,
            t: Tensor,
            v: Tensor | None,
            w: Tensor | None,
            reduction: int,
            hold: bool,
            *parameters: Any,
        ) -> tuple[Tensor, Tensor]:
            return run_forward(x, t, v, w, reduction, hold, *parameters)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            *tensors, ctx.reduction, ctx.hold = inputs[:6]
            ctx.parameters = inputs[6:]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, output[1] if ctx.hold else None)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> Any:
            if dy is None:
                return (None,) * 4 + no_gradients
            *tensors, held = ctx.saved_tensors
            needs = ctx.needs_input_grad[:4]
            if differentiated() or (not torch.compiler.is_compiling() and is_batched(dy)):
                return *wanted(
                    needs, loss.backward(dy, *tensors, ctx.reduction, needs, *ctx.parameters)
                ), *no_gradients
            if held is None:
                return *wanted(
                    needs, run_backward(dy, *tensors, ctx.reduction, needs, *ctx.parameters)
                ), *no_gradients
            dx = release(held, dy)
            dt = -dx if needs[1] and loss.dt is None else None
            needs = (False, needs[1] and dt is None, *needs[2:])
            if not any(needs):
                return dx, dt, None, None, *no_gradients
            grads = wanted(needs, run_backward(dy, *tensors, ctx.reduction, needs, *ctx.parameters))
            return dx, grads[1] if dt is None else dt, *grads[2:], *no_gradients

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return loss.jvp(tangents[:4], *ctx.saved_tensors[:4], ctx.reduction, *ctx.parameters)

    def value_of(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *args: run(*args)[0]

    def forward_of(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def forward(ctx: Any, *args: Any) -> Tensor:
            y, held = run(*args)
            *tensors, ctx.reduction, ctx.hold = args[:6]
            ctx.parameters = args[6:]
            ctx.to_save, ctx.materialize_grads = (
                (*tensors, held if ctx.hold else None),
                False,
            )  # as the methods set it
            return y

        return forward

    def backward_of(release: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        def backward(ctx: Any, dy: Tensor) -> Any:
            held = ctx.saved_tensors[4]
            if held is None or True in ctx.needs_input_grad[1:4]:
                return Definition.backward(ctx, dy)
            return release(held, dy), None, None, None, *no_gradients

        return backward

    faces: Any = Definition
    for way, run, release_way in (
        ("direct", aten_forward, release_directly),
        ("kernel", run_forward.kernels, release_by_kernels),
    ):  # type: ignore[attr-defined]
        setattr(faces, f"{way}_value", staticmethod(value_of(run)))
        setattr(faces, f"{way}_forward", staticmethod(forward_of(run)))
        setattr(faces, f"{way}_backward", staticmethod(backward_of(release_way)))
    Definition.__name__ = loss.name
    Definition.__doc__ = loss.formula
    return Definition


def _function(loss: Loss, composed: bool, on_cuda: str | None = "float32") -> Callable[..., Any]:
    """``composed``: what stock puts together of plain arithmetic, which autocast leaves in the
    lower dtype on a CPU, and on a GPU where there is neither a power nor a logarithm nor a sum in
    it."""
    return differentiable(
        autocast_cpu=None if composed else "float32", autocast_cuda=on_cuda, keeps=True
    )(_definition(loss))


_PLAIN = {
    name: _function(loss, composed=name == "gaussian_nll_loss") for name, loss in LOSSES.items()
}
_WEIGHTED = _PLAIN | {
    name: _function(LOSSES[name], composed=True) for name in ("mse_loss", "l1_loss")
}
_WEIGHTED_EACH = _WEIGHTED | {"l1_loss": _function(LOSSES["l1_loss"], composed=True, on_cuda=None)}


#: name -> the direct face of the plain loss, and that by kernels. Their arguments are those of the
#: primitive: x, t, v, w, reduction, hold and the parameters.
DIRECT: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    name: (op.apply_directly, op.apply_by_kernels)  # type: ignore[attr-defined]
    for name, op in _PLAIN.items()
}


def pointwise(
    name: str,
    x: Tensor,
    t: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    reduction: int,
    *parameters: Any,
) -> Tensor:
    """The loss of that name.

    Args:
        x, t, v, w: input, target, the loss's third tensor and the weight, floating-point, of one
            shape and dtype; v and w may be None.
        reduction: 0, 1 or 2, for each element's loss, their mean or their sum.
        parameters: the loss's own, in order.
    """
    op = (_PLAIN if w is None else _WEIGHTED_EACH if reduction == NONE else _WEIGHTED)[name]
    return op(x, t, v, w, reduction, holds(x, reduction != NONE), *parameters)
