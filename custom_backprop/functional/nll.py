"""``nll_loss``, with the signature of ``torch.nn.functional``, and what it has in common with
``cross_entropy``.

Derivation: :mod:`custom_backprop.formulas.nll`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..ops import nll as ops
from ..ops.route import overridable
from .arguments import reduction_of

__all__ = ["nll_loss"]


@overridable
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """L_r = -w_t x_rt for the class t of each row r;  dx_rc = -w_t dy_r [c = t]. The mean is Σ L_r
    / Σ w_t.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, ..., dK), floating-point.
        target: classes in [0, C), of shape (), (N) or (N, d1, ..., dK), int64 (or uint8, unless
            ``input`` has more than two dimensions).
        weight: (C), of the dtype of ``input``; ones by default. It has no gradient.
        ignore_index: the class whose rows count for nothing. If all do, the mean is NaN and dx is
            0.
        reduction: "none" (a loss of the shape of ``target``), "mean" or "sum". ``size_average`` and
            ``reduce`` are its deprecated forms.

    Raises:
        IndexError: a class out of range, on a CPU. On a GPU, where to look is to wait, the loss and
            the gradient of its row are NaN.
        ValueError: an unknown reduction, a batch size that does not fit, an input without
            dimensions.
        RuntimeError: other shapes, dtypes or devices that do not fit, a weight that requires grad.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    number = _Reduction.get_enum(reduction)
    check_tensors("nll_loss", input, target, ignore_index)
    if without_rows(input):
        return torch.nn.functional.nll_loss(
            input, target, weight, ignore_index=ignore_index, reduction=reduction
        )
    check_classes("nll_loss", input, target, weight)
    return by_rows(ops.nll_loss, input, target, weight, number, ignore_index)


def without_rows(input: Tensor) -> bool:
    """What stock is left to refuse, or to call NaN: no dimension, no classes, no real
    floating-point numbers."""
    return (
        not input.dim()
        or not input.shape[0 if input.dim() == 1 else 1]
        or not input.is_floating_point()
    )


def check_tensors(name: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raises TypeError, as stock does."""
    for which, t in (("input", input), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {which} must be a Tensor, not {type(t).__name__}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an int, not {type(ignore_index).__name__}")


def check_classes(name: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    dims = input.dim()
    if dims == 1:
        if target.numel() != 1 or target.dim() > 1:
            raise ValueError(f"{_misfit(name, input, target)}: expected one class")
    elif not target.dim() or target.shape[0] != input.shape[0]:
        raise ValueError(f"{_misfit(name, input, target)}: the batch sizes differ")
    elif target.dim() != dims - 1 or (dims > 2 and target.shape[1:] != input.shape[2:]):
        hint = ""
        if dims > 2 and target.shape == input.shape[:-1]:
            hint = "; if the classes are in the last dimension: input.transpose(1, -1)"
        expected = (input.shape[0], *input.shape[2:])
        raise RuntimeError(f"{_misfit(name, input, target)}: expected {expected}{hint}")
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or dims > 2):
        raise RuntimeError(
            f"{name}: expected classes in int64 or, for an input of at most two dimensions, uint8, "
            f"got {target.dtype}"
        )
    if target.device != input.device:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, got {input.device} and {target.device}"
        )
    if weight is not None:
        check_weight(name, input, weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} is not differentiable with respect to the weight of classes, which "
                "requires grad"
            )


def _misfit(name: str, input: Tensor, target: Tensor) -> str:
    shapes = f"{tuple(target.shape)} does not fit an input of shape {tuple(input.shape)}"
    return f"{name}: a target of shape {shapes}"


def check_weight(name: str, input: Tensor, weight: Tensor) -> None:
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: weight must have the shape ({classes},), one number a class, got "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"{name}: expected a weight of the dtype of the input, {input.dtype}, got "
            f"{weight.dtype}"
        )


def by_rows(
    op: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    *options: Any,
) -> Tensor:
    """``op`` on (N, C) or (N, C, D): a single row is a batch of one, and d1, ..., dK are one
    dimension."""
    if target.dtype == torch.uint8:
        target = target.long()
    dims = input.dim()
    if dims == 2 or dims == 3:
        return op(input, target, weight, reduction, *options)
    probabilities = target.is_floating_point()
    if dims == 1:
        loss = op(
            input.unsqueeze(0),
            target.unsqueeze(0) if probabilities else target.reshape(1),
            weight,
            reduction,
            *options,
        )
        return loss.squeeze(0) if loss.dim() else loss
    shape = input.shape[:1] + input.shape[2:]
    loss = op(
        input.flatten(2), target.flatten(2 if probabilities else 1), weight, reduction, *options
    )
    return loss.view(shape) if loss.dim() else loss
