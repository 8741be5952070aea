"""``nll_loss``, with the signature of ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.nll`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..ops import nll as ops
from ..ops.route import overridable
from .arguments import by_rows, check_classes, check_tensors, reduction_of, without_rows

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
            input, target, weight, None, ignore_index, None, reduction
        )
    check_classes("nll_loss", input, target, weight)
    return by_rows(ops.nll_loss, input, target, weight, number, ignore_index)
