"""Rotary position embedding.

Derivation: :mod:`custom_backprop.formulas.rotary`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import rotary as ops
from ..ops.route import overridable
from .arguments import not_tensors

__all__ = ["rotary_embedding"]


@overridable
def rotary_embedding(
    input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, offset: int = 0,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(a, b) -> (a cos φ - b sin φ, a sin φ + b cos φ) for each pair of a row at position p, where
    cos φ and sin φ are row p of two tables;  (da, db) is dy turned by -φ.

    Args:
        input: (..., seq, dim), floating-point: the queries or keys of scaled_dot_product_attention,
            (batch, heads, seq, dim). Of other orders take a view, as ``x.transpose(1, 2)`` of
            (batch, seq, heads, dim): any strides will do, and the result has the same.
        cos, sin: (positions, half), of the dtype of ``input``, or float32 for half precision. The
            first 2 half numbers of a row are turned, and the rest passes through. They have no
            gradient. :class:`custom_backprop.nn.RotaryEmbedding` makes them.
        interleaved: whether pair i is (x_2i, x_(2i+1)), as in GPT-J, or (x_i, x_(i+half)), as in
            GPT-NeoX and Llama.
        offset: added to every position: the number of rows before the first, such as those of a
            cache of keys.
        positions: of each row, integers of shape (seq), (1, seq) or (batch, seq), where batch is
            the first dimension of ``input``. Default: 0, 1, 2, ...

    Returns:
        of the shape and dtype of ``input``.

    Raises:
        IndexError: a position without a row in the tables. On a GPU, where to look into
            ``positions`` is to wait, the result of its row is NaN.
        RuntimeError: shapes, dtypes or devices that do not fit, tables that require grad.
        NotImplementedError: input that is not floating-point.
        TypeError: something is not a tensor, or an offset is not an integer.

    Formula: Su et al., "RoFormer", 2021.
    """
    _check(input, cos, sin, offset, positions)
    folded = input.flatten(1, -3) if input.dim() > 4 else input
    y = ops.rotary_embedding(folded, cos, sin, positions, offset, bool(interleaved), False)
    return y.view(input.shape) if input.dim() > 4 else y


def _check(x, cos, sin, offset, positions):
    if not all(isinstance(t, Tensor) for t in (x, cos, sin)):
        raise not_tensors("rotary_embedding", x, cos, sin)
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"rotary_embedding: offset must be an int, not {type(offset).__name__}")
    if not x.is_floating_point():
        raise NotImplementedError(f"rotary_embedding is not implemented for {x.dtype}")
    tables = f"tables of shape {tuple(cos.shape)} and {tuple(sin.shape)}"
    if x.dim() < 2 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise RuntimeError(
            "rotary_embedding: expected an input (..., seq, dim) and tables (positions, half) with "
            f"2 half <= dim, got an input of shape {tuple(x.shape)} and {tables}"
        )
    half_precision = x.dtype in (torch.float16, torch.bfloat16)
    if cos.dtype != sin.dtype or not (
        cos.dtype == x.dtype or (half_precision and cos.dtype == torch.float32)
    ):
        raise RuntimeError(
            "rotary_embedding: expected tables of the dtype of the input, or in float32 for half "
            f"precision, got {cos.dtype} and {sin.dtype} for {x.dtype}"
        )
    given = [t for t in (cos, sin, positions) if t is not None]
    if any(t.device != x.device for t in given):
        raise RuntimeError(
            "rotary_embedding: expected all tensors on one device, got "
            f"{', '.join(str(t.device) for t in (x, *given))}"
        )
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        raise RuntimeError(
            "rotary_embedding is not differentiable with respect to cos and sin, which require grad"
        )
    if positions is None:
        if x.shape[-2] and not 0 <= offset <= cos.shape[0] - x.shape[-2]:
            raise IndexError(
                f"rotary_embedding: positions {offset} to {offset + x.shape[-2] - 1} are out of "
                f"range for {tables}"
            )
        return
    if positions.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"rotary_embedding: expected positions in int32 or int64, got {positions.dtype}"
        )
    fits = positions.dim() == 1 or (positions.dim() == 2 and x.dim() > 2)
    if not fits or positions.shape[-1] != x.shape[-2] or (
        positions.dim() == 2 and positions.shape[0] not in (1, x.shape[0])
    ):  # fmt: skip
        raise RuntimeError(
            "rotary_embedding: expected positions of shape (seq), (1, seq) or (batch, seq), got "
            f"{tuple(positions.shape)} for an input of shape {tuple(x.shape)}"
        )
