"""Autograd of the pointwise losses: dx = dy w l_x, dt = dy w l_t, dv = dy w l_v, dw = dy l, with
dy / n instead of dy for a mean.

If the loss is a scalar, forward already computes dx for dy = 1 (``gradient.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends.loss import primitives
from ..formulas.loss import LOSSES, NONE, Loss
from .gradient import is_made_in_forward, scaled
from .route import op


def _define(loss: Loss, **policies: str) -> Callable[..., Any]:
    class Definition:
        forward_op, backward_op = primitives[loss.name]
        has_statistics = True
        autocast = policies

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            *tensors, ctx.reduction, make_dx = inputs[:6]
            ctx.parameters = inputs[6:]
            ctx.save_for_backward(*tensors, output[1] if make_dx else None)

        @staticmethod
        def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
            *tensors, made = ctx.saved_tensors
            needs = ctx.needs_input_grad[:4]
            if made is None or ctx.is_differentiated:
                return run(dy, *tensors, ctx.reduction, needs, *ctx.parameters)
            dx = scaled(ctx, made, dy)
            if not any(needs[1:]):
                return dx
            others = (False, *needs[1:])
            return dx, *run(dy, *tensors, ctx.reduction, others, *ctx.parameters)[1:]

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            *tensors, _ = ctx.saved_tensors
            return loss.jvp(tangents[:4], *tensors, ctx.reduction, *ctx.parameters)

    Definition.__name__, Definition.__doc__ = loss.name, loss.formula
    return op(Definition)


# Autocast does not cast plain arithmetic, of which stock composes some losses: not at all on a CPU,
# and on a GPU not unless it contains a power, a logarithm or a sum.
_PLAIN = {
    name: _define(loss, cuda="float32")
    if name == "gaussian_nll_loss"
    else _define(loss, cpu="float32", cuda="float32")
    for name, loss in LOSSES.items()
}
_WEIGHTED = {name: _define(LOSSES[name], cuda="float32") for name in ("mse_loss", "l1_loss")}
_WEIGHTED_EACH = {"l1_loss": _define(LOSSES["l1_loss"])}


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
        x, t, v, w: input, target, the loss's third tensor and the weight, floating-point, of the
            same shape and dtype; v and w may be None.
        reduction: one of those in ``formulas/loss.py``.
        parameters: the loss's own, in order.
    """
    function = _PLAIN[name]
    if w is not None:
        function = _WEIGHTED.get(name, function)
        function = _WEIGHTED_EACH.get(name, function) if reduction == NONE else function
    make_dx = is_made_in_forward(primitives[name][0], x, reduction != NONE)
    return function(x, t, v, w, reduction, make_dx, *parameters)
