"""``embedding_bag``, with the signature of ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.embedding_bag`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.constant import indices
from ..ops import embedding_bag as ops
from ..ops.route import overridable
from .embedding import INDICES, not_a_look_up, renormalize, row_of_padding

__all__ = ["embedding_bag"]


@overridable
def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2, scale_grad_by_freq: bool = False, mode: str = "mean",
    sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """y_b is the sum, mean or maximum of W_t over the indices t of bag b;  dW_v = Σ dy_b of the
    bags with v, the same bits every time. An empty bag is 0.

    Args:
        input: indices in [0, rows), int32 or int64: (bags, n), or (N) of all bags one after the
            other, which ``offsets`` tells apart.
        weight: (rows, columns), floating-point; its gradient is summed in float32 (float64 of
            float64).
        offsets: (bags), where each bag of a 1-D ``input`` starts, from 0; with
            ``include_last_offset`` (bags + 1), with the end of the last.
        max_norm, norm_type, scale_grad_by_freq, sparse: as of :func:`embedding`, the last two not
            for maxima.
        mode: "sum", "mean" or "max", whose gradient goes to the first of equal ones.
        per_sample_weights: what each row of a sum is multiplied by, of the shape of ``input`` and
            the dtype of ``weight``. It has a gradient.
        padding_idx: an index that counts for nothing, and whose row gets no gradient.

    Returns:
        (bags, columns).

    Raises:
        IndexError, RuntimeError: an index out of range, on a CPU, as stock does. On a GPU, where to
            look is to wait, its bag is NaN and it adds nothing to the gradient.
        ValueError: shapes that do not fit, an unknown mode, an option that it does not have.
        NotImplementedError: ``per_sample_weights`` for another mode than "sum".
        RuntimeError: other dtypes, two devices, ``padding_idx`` out of range, ``sparse`` together
            with ``scale_grad_by_freq``.
        TypeError: something is not a tensor.
    """
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    if tensors and (not weight.is_floating_point() or input.is_nested):
        # without a gradient, nested, or in stock's deprecated order
        return torch.nn.functional.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
    if not (
        tensors and input.dtype in INDICES and weight.dim() == 2 and input.device == weight.device
    ):
        raise not_a_look_up("embedding_bag", input, weight)
    if (
        mode not in ("sum", "mean")
        or scale_grad_by_freq
        or sparse
        or per_sample_weights is not None
    ):
        _check_options(mode, scale_grad_by_freq, sparse, per_sample_weights, input, weight)
    padding = -1
    if padding_idx is not None:
        padding = row_of_padding("embedding_bag", padding_idx, weight, RuntimeError)
    if input.dim() == 2 and offsets is None:
        bags, n = input.shape
        index, bounds = input.reshape(-1), n * indices(input, bags + 1)
    else:
        index, bounds = input, _bounds(input, offsets, include_last_offset)
    if max_norm is not None:
        renormalize(weight, index, max_norm, norm_type)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.reshape(-1)
    return ops.embedding_bag(
        weight, per_sample_weights, index, bounds, mode, padding, bool(scale_grad_by_freq),
        bool(sparse),
    )  # fmt: skip


def _check_options(mode, scale_grad_by_freq, sparse, per_sample_weights, input, weight):
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"embedding_bag: mode has to be one of sum, mean or max, got {mode!r}")
    if mode == "max" and (scale_grad_by_freq or sparse):
        raise ValueError("embedding_bag: max has no scale_grad_by_freq and no sparse gradient")
    if sparse and scale_grad_by_freq:
        raise RuntimeError("embedding_bag: scale_grad_by_freq is not supported if sparse")
    if per_sample_weights is None:
        return
    if per_sample_weights.shape != input.shape:
        raise ValueError(
            "embedding_bag: per_sample_weights must have the shape of input, "
            f"{tuple(input.shape)}, got {tuple(per_sample_weights.shape)}"
        )
    if mode != "sum":
        raise NotImplementedError(f"embedding_bag: per_sample_weights are for sums, got {mode!r}")
    if per_sample_weights.dtype != weight.dtype:
        raise RuntimeError(
            "embedding_bag: expected per_sample_weights of the dtype of weight, "
            f"{weight.dtype}, got {per_sample_weights.dtype}"
        )


def _bounds(input, offsets, include_last_offset):
    """Where each bag of a 1-D input starts, and where the last ends."""
    if input.dim() == 2:
        raise ValueError("embedding_bag: offsets are for an input of one dimension, not of two")
    if input.dim() != 1 or offsets is None or offsets.dim() != 1:
        shape = None if offsets is None else tuple(offsets.shape)
        raise ValueError(
            "embedding_bag: expected an input of two dimensions, or one of one and offsets of one, "
            f"got shapes {tuple(input.shape)} and {shape}"
        )
    if include_last_offset:
        if not offsets.shape[0]:
            raise RuntimeError("embedding_bag: offsets of no bag include no last offset")
        return offsets.long()
    end = offsets.new_full((1,), input.shape[0], dtype=torch.int64)
    return torch.cat((offsets.long(), end))
