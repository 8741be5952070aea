"""Attention, with the name and signature of ``torch.nn.functional``'s, and more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.selection import is_autocast
from ..dtensor import is_dtensor
from ..ops.attention import attention
from ..ops.route import overridable
from .arguments import SEEDS, cast_to_one_dtype, no_seed, not_tensors, number

__all__ = ["scaled_dot_product_attention"]

_NAME = "scaled_dot_product_attention"


@overridable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = P v, P = softmax(c q kᵀ + b);  ds = P (dy vᵀ - dy · y), dq = c ds k, dk = c dsᵀ q,
    dv = Pᵀ dy, db = ds. With dropout y = (P n) v, n of a seed; dy vᵀ and Pᵀ have n too.

    A query that may attend to nothing gets 0. No tensor of L x S numbers is written or saved, but
    for the gradient of a mask. Dropout saves a seed, and backward makes its zeros again.

    Args:
        query: (..., H, L, E), floating-point.
        key: (..., H, S, E). Dimensions before the last two broadcast to those of the query, and
            the other way round.
        value: (..., H, S, F).
        attn_mask: broadcasts to (..., H, L, S): booleans, of which True lets a query attend to a
            key, or numbers in the dtype of ``query`` or in float32, which are added to the scores.
        dropout_p: the probability of a zero in P, also in evaluation. The rest is divided by 1 - p.
        is_causal: query i attends to keys 0 to i, whatever L and S.
        scale: c. Default: 1 / √E.
        enable_gqa: ``key`` and ``value`` have fewer heads, which divide H: each serves as many
            heads of ``query``, one after another.
        window: (left, right): query i attends to keys i + S - L - left to i + S - L + right. None
            is no limit. The last query stands at the last key, as in decoding with a cache;
            ``(None, 0)`` is then the causal mask.
        alibi_slopes: (H,), the slope m of each head: -m |i + S - L - j| is added to the scores.
        seed: that of dropout, an int64 tensor of one element on the device of ``query``. The zeros
            then depend on it and on the shapes alone, and are the same on every device. Default: it
            is drawn from torch's generator, so that ``torch.manual_seed``, checkpoints and ``vmap``
            do what they do to :func:`custom_backprop.functional.dropout`.

    Returns:
        (..., H, L, F), in the dtype of ``query``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, ``dropout_p`` is not in [0, 1],
            ``alibi_slopes`` requires grad, or DTensors have dropout without a ``seed``.
        IndexError: a mask of fewer than two dimensions, or ``enable_gqa`` without heads.
        TypeError: something is not a tensor, or not a number.
        ValueError: ``window`` is not a pair, or has a negative number.

    Derivation: :mod:`custom_backprop.formulas.attention`.
    """
    _check(query, key, value, attn_mask, dropout_p)
    expected = torch.int64, 1, query.device
    if seed is not None and (seed.dtype, seed.numel(), seed.device) != expected:
        raise no_seed(_NAME, query, seed)
    if query.is_nested or not query.is_floating_point():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    L, S, E = query.shape[-2], key.shape[-2], query.shape[-1]
    scale = 1 / math.sqrt(max(E, 1)) if scale is None else number(_NAME, scale)
    lowest, highest = (None, None) if window is None else _band(window, S - L)
    if is_causal:
        highest = 0 if highest is None else min(highest, 0)
    q, k, v, leading = query, key, value, query.shape[:-2]
    plain = q.dim() == 4 and k.dim() == v.dim() == 4 and k.shape[:2] == v.shape[:2] == leading
    if not plain:
        q, k, v, leading = _in_four_dimensions(q, k, v, enable_gqa)
    if attn_mask is not None:
        attn_mask = _mask_in_four_dimensions(attn_mask, leading, L, S)
    if alibi_slopes is not None:
        alibi_slopes = _slopes(alibi_slopes, q)
    seed = _seed(seed, q) if dropout_p else None
    p = float(dropout_p)
    y = attention(q, k, v, attn_mask, alibi_slopes, seed, p, lowest, highest, scale)
    return y if plain else y.reshape(*leading, L, y.shape[3])


def _check(q, k, v, mask, p):
    """Raises what stock raises; its own kernel would read past the end of a value that is too
    short."""
    given = (q, k, v) if mask is None else (q, k, v, mask)
    for t in given:
        if not isinstance(t, Tensor):
            raise not_tensors(_NAME, *given)
    if q.is_nested:
        return  # stock's own checks follow
    if min(q.dim(), k.dim(), v.dim()) < 2:
        raise RuntimeError(f"{_NAME}: expected at least two dimensions, got {_shapes(q, k, v)}")
    if k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        raise RuntimeError(
            f"{_NAME}: query (..., L, E), key (..., S, E) and value (..., S, F) do not fit, got "
            f"{_shapes(q, k, v)}"
        )
    if not 0 <= p <= 1:
        raise RuntimeError(f"{_NAME}: dropout_p must be between 0 and 1, got {p}")
    if any(t.device != q.device for t in given):
        raise RuntimeError(
            f"{_NAME}: expected all tensors on one device, got "
            f"{', '.join(str(t.device) for t in given)}"
        )
    fits = mask is None or mask.dtype in (torch.bool, torch.float32, q.dtype) or is_autocast(q)
    if not (fits and (k.dtype == v.dtype == q.dtype or cast_to_one_dtype(q, k, v))):
        raise RuntimeError(
            f"{_NAME}: query, key and value must have the same dtype, and a mask that of the query,"
            f" bool or float32, got {', '.join(str(t.dtype) for t in given)}"
        )


def _shapes(*tensors):
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _band(window, excess):
    """The least and the largest j - i of a window."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{_NAME}: window must be a pair (left, right), got {window!r}")
    left, right = window
    if not all(w is None or isinstance(w, (int, torch.SymInt)) for w in window):
        raise TypeError(f"{_NAME}: window must be of integers or None, got {window!r}")
    if (left or 0) < 0 or (right or 0) < 0:
        raise ValueError(f"{_NAME}: window must not be negative, got {window!r}")
    return None if left is None else excess - left, None if right is None else excess + right


def _in_four_dimensions(q, k, v, enable_gqa):
    """q, k and v as (B, H, L, E), (B, K, S, E) and (B, K, S, F) with K a divisor of H, and the
    result's dimensions before the last two."""
    found = _shapes(q, k, v)
    heads = tuple(t.shape[-3] if t.dim() > 2 else 1 for t in (q, k, v))
    if enable_gqa:
        if min(q.dim(), k.dim(), v.dim()) < 3:
            raise IndexError(f"{_NAME}: enable_gqa needs a dimension of heads, got {found}")
        if not (heads[1] and heads[2]) or heads[0] % heads[1] or heads[0] % heads[2]:
            raise RuntimeError(
                f"{_NAME}: the heads of key and value must divide those of the query, got {found}"
            )
        H = heads[0]
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
        if not enable_gqa:
            (H,) = torch.broadcast_shapes(*((h,) for h in heads))
    except RuntimeError:
        raise RuntimeError(
            f"{_NAME}: the dimensions before the last two do not broadcast, got {found}"
        ) from None
    # keys and values of as many heads each: one for all queries is not repeated
    K = heads[1] if heads[1] == heads[2] and heads[1] and H % heads[1] == 0 else H

    def four(t, count):
        t = t if t.dim() > 2 else t.unsqueeze(0)
        if t.shape[-3] not in (1, count):
            t = t.repeat_interleave(count // t.shape[-3], -3)
        t = t.expand(*batch, count, *t.shape[-2:])
        return t.reshape(batch.numel(), *t.shape[-3:])

    leading = (*batch, H) if max(q.dim(), k.dim(), v.dim()) > 2 else ()
    return four(q, H), four(k, K), four(v, K), leading


def _mask_in_four_dimensions(mask, leading, L, S):
    """The mask as (1 or B, 1 or H, L, S)."""
    shape = (*leading, L, S)
    if mask.dim() < 2:
        raise IndexError(f"{_NAME}: a mask has at least two dimensions, got {tuple(mask.shape)}")
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(m not in (1, n) for m, n in pairs):
        raise RuntimeError(
            f"{_NAME}: a mask of shape {tuple(mask.shape)} does not broadcast to the scores' shape "
            f"{shape}"
        )
    before = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape[:-2])
    batch, heads = before[:-1], before[-1:] or (1,)
    if any(n != 1 for n in batch):
        mask = mask.expand(*leading[:-1], *heads, L, S)
        return mask.reshape(math.prod(leading[:-1]), *heads, L, S)
    return mask.expand(*mask.shape[:-2], L, S).reshape(1, *heads, L, S)


def _seed(seed, q):
    if seed is None and is_dtensor(q):
        raise RuntimeError(
            f"{_NAME}: dropout of DTensors needs a seed, which is a replicated DTensor; or call it "
            "on each rank's own tensors (to_local)"
        )
    return torch.randint(SEEDS, (), device=q.device) if seed is None else seed


def _slopes(slopes, q):
    """The slopes of ALiBi, in the one dtype that autocast leaves alone."""
    if not isinstance(slopes, Tensor):
        raise not_tensors(_NAME, slopes)
    if slopes.shape != q.shape[1:2] or slopes.device != q.device:
        raise RuntimeError(
            f"{_NAME}: expected alibi_slopes of shape ({q.shape[1]},) on {q.device}, one number a "
            f"head, got {tuple(slopes.shape)} on {slopes.device}"
        )
    if slopes.requires_grad:
        raise RuntimeError(
            f"{_NAME} is not differentiable with respect to alibi_slopes, which requires grad: "
            "give what they add as attn_mask"
        )
    return slopes.double() if is_autocast(q) else slopes
