"""Autograd of nll_loss and cross_entropy, on x (N, C) or (N, C, D) and a target of its dtype
(probabilities) or of int64 (classes)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import cross_entropy as primitives
from ..formulas import cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING, STATISTICS
from ..formulas.loss import NONE
from .function import differentiable, differentiated
from .held import holds, release, release_by_kernels, release_directly


def _check_dtype(name: str, x: Tensor, weight: Tensor | None) -> None:
    """Raises RuntimeError, as stock does; not sooner, since autocast may yet bring the two
    together."""
    if weight is not None and weight.dtype != x.dtype:
        raise RuntimeError(
            f"{name}: expected a weight of the dtype of the input, {x.dtype}, got {weight.dtype}"
        )


#: beside what the primitives may keep: what a direct call on small logits keeps
LOG_PROBABILITIES = -1


class NLLLoss:
    """L_r = -w_t x_rt;  dx_rc = -w_t dy_r [c = t]."""

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        _check_dtype("nll_loss", x, weight)
        return primitives.nll_forward(x, target, weight, reduction, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, target, weight, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, output[1])
        ctx.save_for_forward(target, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 5
        x, target, weight, total = ctx.saved_tensors
        run = formula.nll_backward if differentiated() else primitives.nll_backward
        return run(dy, x, target, weight, total, *ctx.options), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: None) -> Any:
        target, weight = ctx.saved_tensors
        return formula.nll_forward(tx, target, weight, *ctx.options)[0]

    @staticmethod
    def direct_value(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
    ) -> Tensor:
        _check_dtype("nll_loss", x, weight)
        return primitives.nll_forward_aten(x, target, weight, reduction, ignore_index)[0]

    @staticmethod
    def direct_forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
    ) -> Tensor:
        _check_dtype("nll_loss", x, weight)
        loss, total = primitives.nll_forward_aten(x, target, weight, reduction, ignore_index)
        ctx.options = reduction, ignore_index
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, total)
        return loss

    @staticmethod
    def direct_backward(ctx: Any, dy: Tensor) -> Any:
        return (
            primitives.nll_backward_aten(dy, *ctx.saved_tensors, *ctx.options),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def kernel_value(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
    ) -> Tensor:
        _check_dtype("nll_loss", x, weight)
        return primitives.nll_forward.kernels(x, target, weight, reduction, ignore_index)[0]  # type: ignore[attr-defined]

    @staticmethod
    def kernel_forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: int
    ) -> Tensor:
        _check_dtype("nll_loss", x, weight)
        loss, total = primitives.nll_forward.kernels(x, target, weight, *options)  # type: ignore[attr-defined]
        ctx.options = options
        ctx.to_save, ctx.materialize_grads = (x, target, weight, total), False
        return loss

    @staticmethod
    def kernel_backward(ctx: Any, dy: Tensor) -> Any:
        return (
            primitives.nll_backward.kernels(dy, *ctx.saved_tensors, *ctx.options),
            None,
            None,
            None,
            None,
        )  # type: ignore[attr-defined]


class CrossEntropy:
    """L_r = Σ_c q_rc (lse_r - x_rc);  dx = dy (p Q - q)."""

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        smoothing: float,
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        _check_dtype("cross_entropy", x, weight)
        return primitives.forward(x, target, weight, reduction, ignore_index, smoothing, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, target, weight, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, output[1])
        ctx.save_for_forward(x, target, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 7
        x, target, weight, kept, *_ = ctx.saved_tensors
        reduction, ignore_index, smoothing, keep = ctx.options
        need_x, need_target = ctx.needs_input_grad[:2]
        if keep == GRADIENT and not differentiated():
            return release(kept, dy), None, None, None, None, None, None
        run = (
            formula.backward
            if differentiated() or keep == LOG_PROBABILITIES
            else primitives.backward
        )
        dx, dtarget = run(
            dy, x, target, weight, kept, reduction, ignore_index, smoothing, need_x, need_target
        )
        return (
            dx if need_x else None,
            dtarget if need_target else None,
            None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, ttarget: Tensor | None, *_: None) -> Any:
        x, target, weight = ctx.saved_tensors
        reduction, ignore_index, smoothing, _ = ctx.options
        return formula.jvp(x, target, weight, reduction, ignore_index, smoothing, tx, ttarget)

    @staticmethod
    def direct_value(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        _check_dtype("cross_entropy", x, weight)
        return primitives.forward_aten(x, target, weight, *options)[0]

    @staticmethod
    def direct_forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        smoothing: float,
        keep: int,
    ) -> Tensor:
        _check_dtype("cross_entropy", x, weight)
        if not primitives.is_small(x, target, smoothing):
            output = primitives.forward_aten(
                x, target, weight, reduction, ignore_index, smoothing, keep
            )
            CrossEntropy.setup_context(
                ctx, (x, target, weight, reduction, ignore_index, smoothing, keep), output
            )
            return output[0]
        log_p = torch._log_softmax(x, 1, False)
        loss, total = primitives.nll_forward_aten(log_p, target, weight, reduction, ignore_index)
        ctx.options = reduction, ignore_index, smoothing, LOG_PROBABILITIES
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, log_p, total)
        return loss

    @staticmethod
    def direct_backward(ctx: Any, dy: Tensor) -> Any:
        reduction, ignore_index, _, keep = ctx.options
        if keep == GRADIENT:
            return release_directly(ctx.saved_tensors[3], dy), None, None, None, None, None, None
        if keep != LOG_PROBABILITIES:
            return CrossEntropy.backward(ctx, dy)
        _, target, weight, log_p, total = ctx.saved_tensors
        dlog_p = primitives.nll_backward_aten(
            dy, log_p, target, weight, total, reduction, ignore_index
        )
        return (
            torch._log_softmax_backward_data(dlog_p, log_p, 1, log_p.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def kernel_value(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        _check_dtype("cross_entropy", x, weight)
        return primitives.forward.kernels(x, target, weight, *options)[0]  # type: ignore[attr-defined]

    @staticmethod
    def kernel_forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        _check_dtype("cross_entropy", x, weight)
        loss, kept = primitives.forward.kernels(x, target, weight, *options)  # type: ignore[attr-defined]
        ctx.options = options
        ctx.to_save, ctx.materialize_grads = (x, target, weight, kept), False
        return loss

    @staticmethod
    def kernel_backward(ctx: Any, dy: Tensor) -> Any:
        if ctx.options[3] == GRADIENT:
            return release_by_kernels(ctx.saved_tensors[3], dy), None, None, None, None, None, None
        return CrossEntropy.backward(ctx, dy)


_nll_loss = differentiable(autocast_cpu="float32", autocast_cuda="float32", keeps=True)(NLLLoss)
_cross_entropy = differentiable(autocast_cpu="float32", autocast_cuda="float32", keeps=True)(
    CrossEntropy
)


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor:
    """The loss of log-probabilities x."""
    return _nll_loss(x, target, weight, reduction, ignore_index)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """The loss of logits x. A gradient of the weight is not given."""
    if not torch.is_grad_enabled() or not (x.requires_grad or target.requires_grad):
        keep = NOTHING
    else:
        keep = GRADIENT if not target.requires_grad and holds(x, reduction != NONE) else STATISTICS
    return _cross_entropy(x, target, weight, reduction, ignore_index, smoothing, keep)
