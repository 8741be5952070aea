"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864): each pair of numbers of a row is
turned by an angle that grows with the row's position.

Pair i at position p has the angle φ = p θ_i. As complex numbers (a + i b) e^(iφ), so

    a' = a cos φ - b sin φ,   b' = a sin φ + b cos φ.

This is linear in (a, b), and its matrix is orthogonal. Its transpose, which backward multiplies by,
is its inverse: the turn by the opposite angle.

    da = da' cos φ + db' sin φ,   db = db' cos φ - da' sin φ.

A product of two rows that were turned by p and q depends on p - q alone: the turns cancel but for
e^(i(p-q)θ). The first 2 half numbers of a row are pairs, where half is the width of the tables of
cosines and sines; the rest passes through. Pair i is (x_i, x_(i+half)), as in Llama, or interleaved
(x_2i, x_(2i+1)), as in the paper and in GPT-J.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen


def at_positions(table: Tensor, x: Tensor, offset: int, positions: Tensor | None) -> Tensor:
    """The rows of a table for the rows of x, as (seq, half) or (batch, 1, ..., seq, half)."""
    if positions is None:
        return table[offset : offset + x.shape[-2]]
    rows = torch.embedding(table, positions + offset if offset else positions)
    if positions.dim() == 1:
        return rows
    return rows.view(rows.shape[0], *[1] * (x.dim() - 3), *rows.shape[1:])


def pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """a and b of all pairs, as views."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool,
    inverse: bool = False,
) -> Tensor:  # fmt: skip
    """y; or with ``inverse``, by the opposite angle, dx of x = dy."""
    half = cos.shape[-1]
    c, s = (widen(at_positions(t, x, offset, positions)) for t in (cos, sin))
    if inverse:
        s = -s
    a, b = pairs(widen(x), half, interleaved)
    turned = a * c - b * s, a * s + b * c
    y = torch.stack(turned, -1) if interleaved else torch.cat(turned, -1)
    y = y.reshape(*x.shape[:-1], 2 * half)
    return torch.cat((y.to(x.dtype), x[..., 2 * half :]), -1)
