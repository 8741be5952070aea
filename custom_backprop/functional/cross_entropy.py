"""``nll_loss`` and ``cross_entropy``, with the signatures of ``torch.nn.functional``.

Derivations: :mod:`custom_backprop.formulas.cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..ops import cross_entropy as ops
from .loss import reduction_of, same_dtype

__all__ = ["cross_entropy", "nll_loss"]


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
    if _without_rows(input):
        return torch.nn.functional.nll_loss(
            input, target, weight, ignore_index=ignore_index, reduction=reduction
        )
    _check_classes("nll_loss", input, target, weight)
    return _by_rows(ops.nll_loss, input, target, weight, number, ignore_index)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """L_r = Σ_c q_rc (lse_r - x_rc), lse_r = log Σ_c e^(x_rc);  dx_rc = dy_r (p_rc Σ_c q_rc -
    q_rc), with p = softmax(x).

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK), floating-point.
        target: classes, as in :func:`nll_loss`, or probabilities of the shape of ``input``, which
            are differentiated too.
        weight: (C), a factor of each class in q; ones by default. It has a gradient if ``target``
            holds probabilities.
        ignore_index: as in :func:`nll_loss`; for classes only.
        reduction: as in :func:`nll_loss`. For probabilities the mean divides by the number of rows.
        label_smoothing: s in [0, 1]: q is mixed with the uniform distribution, (1 - s) q + s / C.

    Raises:
        IndexError, ValueError, RuntimeError: as :func:`nll_loss`; and RuntimeError for
            ``label_smoothing`` above 1, or ``ignore_index`` beside probabilities.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    number = _Reduction.get_enum(reduction)
    if weight is None and not label_smoothing and _is_common(input, target):
        return ops.cross_entropy(input, target, None, number, ignore_index, 0.0)
    if _without_rows(input):
        options: Any = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        return torch.nn.functional.cross_entropy(input, target, weight, **options)
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    if target.shape != input.shape:
        _check_classes("cross_entropy", input, target, weight)
        return _by_rows(ops.cross_entropy, input, target, weight, number, ignore_index, smoothing)
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for class probabilities, got {ignore_index}"
        )
    if weight is not None:
        _check_weight("cross_entropy", input, weight)
    input, target, weight = same_dtype(input, target, weight)
    if weight is not None and weight.requires_grad:
        of_class = weight.view(-1, *[1] * (input.dim() - 2))
        target, weight, smoothing = (
            of_class * ((1 - smoothing) * target + smoothing / weight.numel()),
            None,
            0.0,
        )
    return _by_rows(ops.cross_entropy, input, target, weight, number, ignore_index, smoothing)


def _is_common(input: Tensor, target: Tensor) -> bool:
    """Whether these are logits (N, C) and classes (N), as nearly always: then nothing else is left
    to check."""
    return (
        target.dtype is torch.int64
        and target.dim() == 1
        and input.dim() == 2
        and input.is_floating_point()
        and input.shape[0] == target.shape[0]
        and input.shape[1] > 0
        and input.device == target.device
    )


def _without_rows(input: Tensor) -> bool:
    """What stock is left to refuse, or to call NaN: no dimension, no classes, no real
    floating-point numbers."""
    return (
        not input.dim()
        or not input.shape[0 if input.dim() == 1 else 1]
        or not input.is_floating_point()
    )


def _check_classes(name: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    dims = input.dim()
    if dims == 1:
        if target.numel() != 1 or target.dim() > 1:
            raise ValueError(f"{_misfit(name, input, target)}: expected one class")
    elif not target.dim() or target.shape[0] != input.shape[0]:
        raise ValueError(f"{_misfit(name, input, target)}: the batch sizes differ")
    elif target.dim() != dims - 1 or (dims > 2 and target.shape[1:] != input.shape[2:]):
        raise RuntimeError(
            f"{_misfit(name, input, target)}: expected {(input.shape[0], *input.shape[2:])}"
        )
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or dims > 2):
        raise RuntimeError(
            f"{name}: expected classes in int64 or, for an input of at most two dimensions, uint8, got {target.dtype}"
        )
    if target.device != input.device:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, got {input.device} and {target.device}"
        )
    if weight is not None:
        _check_weight(name, input, weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} is not differentiable with respect to the weight of classes, which requires grad"
            )


def _misfit(name: str, input: Tensor, target: Tensor) -> str:
    return f"{name}: a target of shape {tuple(target.shape)} does not fit an input of shape {tuple(input.shape)}"


def _check_weight(name: str, input: Tensor, weight: Tensor) -> None:
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: weight must have the shape ({classes},), one number a class, got {tuple(weight.shape)}"
        )


def _by_rows(
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
