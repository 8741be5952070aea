"""``cross_entropy``, with the signature of ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..backends.selection import TENSORS
from ..ops import cross_entropy as ops
from ..ops.route import overridable
from .arguments import (
    by_rows,
    check_classes,
    check_tensors,
    check_weight,
    gains_on_a_cpu,
    reduction_of,
    same_dtype,
    without_rows,
)

__all__ = ["cross_entropy"]


@gains_on_a_cpu
@overridable
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
            is of probabilities.
        ignore_index: as in :func:`nll_loss`; for classes only.
        reduction: as in :func:`nll_loss`. For probabilities the mean divides by the number of rows.
        label_smoothing: s in [0, 1]: q is mixed with the uniform distribution, (1 - s) q + s / C.

    Raises:
        IndexError, ValueError, RuntimeError: as :func:`nll_loss`; and RuntimeError for
            ``label_smoothing`` above 1, or ``ignore_index`` beside probabilities.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    number = _Reduction.get_enum(reduction)
    if weight is None and not label_smoothing and _is_common(input, target, ignore_index):
        return ops.cross_entropy(input, target, None, number, ignore_index, 0.0)
    check_tensors("cross_entropy", input, target, ignore_index)
    if without_rows(input):
        return torch.nn.functional.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    if target.shape != input.shape:
        check_classes("cross_entropy", input, target, weight)
        return by_rows(ops.cross_entropy, input, target, weight, number, ignore_index, smoothing)
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for class probabilities, got {ignore_index}"
        )
    if weight is not None:
        check_weight("cross_entropy", input, weight)
    input, target, weight = same_dtype(input, target, weight)
    if weight is not None and weight.requires_grad:
        of_class = weight.view(-1, *[1] * (input.dim() - 2))
        target = of_class * ((1 - smoothing) * target + smoothing / weight.numel())
        weight, smoothing = None, 0.0
    return by_rows(ops.cross_entropy, input, target, weight, number, ignore_index, smoothing)


def _is_common(input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Whether these are logits (N, C) and classes (N), as nearly always: then nothing else is left
    to check."""
    return (
        type(input) in TENSORS
        and type(target) in TENSORS
        and type(ignore_index) is int
        and target.dtype is torch.int64
        and target.dim() == 1
        and input.dim() == 2
        and input.is_floating_point()
        and input.shape[0] == target.shape[0]
        and input.shape[1] > 0
        and input.device == target.device
    )
