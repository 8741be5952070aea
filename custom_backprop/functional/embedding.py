"""``embedding``, with the signature of ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.embedding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import embedding as ops
from ..ops.route import overridable
from .arguments import not_tensors

__all__ = ["embedding"]

INDICES = (torch.int32, torch.int64)


@overridable
def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """y_r = W_t for each index t of ``input``;  dW_v = Σ dy_r [t = v], the same bits every time.

    Args:
        input: indices in [0, rows), of any shape, int32 or int64.
        weight: (rows, columns), of any dtype; its gradient is summed in float32 (float64 of
            float64).
        padding_idx: a row whose gradient is 0; negative ones count from the end.
        max_norm: rows that are looked up and whose norm is larger are first scaled to this norm, in
            ``weight`` itself.
        norm_type: the p of that norm.
        scale_grad_by_freq: dW_v is divided by the number of times that v was looked up.
        sparse: the gradient is a sparse tensor, with an entry for each index.

    Returns:
        (*, columns), where * is the shape of ``input``.

    Raises:
        IndexError: an index out of range, on a CPU. On a GPU, where to look is to wait, its row is
            NaN and adds nothing to the gradient.
        AssertionError: ``padding_idx`` is out of range.
        RuntimeError: indices that are neither int32 nor int64, a weight that is not 2-D, two
            devices, ``sparse`` together with ``scale_grad_by_freq``.
        TypeError: something is not a tensor.
    """
    if not (
        isinstance(input, Tensor) and isinstance(weight, Tensor) and input.dtype in INDICES
        and weight.dim() == 2 and input.device == weight.device
    ):  # fmt: skip
        raise not_a_look_up("embedding", input, weight)
    padding = -1 if padding_idx is None else row_of_padding("embedding", padding_idx, weight)
    if sparse and scale_grad_by_freq:
        raise RuntimeError("embedding: scale_grad_by_freq is not supported for sparse gradients")
    if max_norm is not None:
        renormalize(weight, input, max_norm, norm_type)
    return ops.embedding(weight, input, padding, bool(scale_grad_by_freq), bool(sparse))


def not_a_look_up(name, input, weight):
    """The error, where these are not indices and a table on one device."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return not_tensors(name, input, weight)
    if input.dtype not in INDICES:
        return RuntimeError(f"{name}: expected indices in int32 or int64, got {input.dtype}")
    if weight.dim() != 2:
        return RuntimeError(f"{name}: 'weight' must be 2-D, got shape {tuple(weight.shape)}")
    return RuntimeError(
        f"{name}: expected all tensors on one device, got {input.device} and {weight.device}"
    )


def row_of_padding(name, padding_idx, weight, error=AssertionError):
    """The row, counted from the start."""
    if not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise error(
            f"{name}: padding_idx must be within num_embeddings, got {padding_idx} for a weight of "
            f"shape {tuple(weight.shape)}"
        )
    return padding_idx % weight.shape[0]


def renormalize(weight, input, max_norm, norm_type):
    """In place, behind autograd's back but not its version counter's, as torch does."""
    torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)
