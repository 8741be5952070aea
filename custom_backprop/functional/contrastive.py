"""Losses that compare whole vectors: ``triplet_margin_loss`` as in ``torch.nn.functional``, and
InfoNCE.

Derivations: :mod:`custom_backprop.formulas.contrastive`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..ops import contrastive as ops
from ..ops.normalize import normalize as unit_vectors
from ..ops.route import overridable
from .arguments import gains_on_a_cpu, not_tensors, reduction_of, same_dtype

__all__ = ["info_nce", "triplet_margin_loss"]


@gains_on_a_cpu
@overridable
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """L = max(0, m + d(a, p) - d(a, n)), d(x, y) = ‖x - y + ε‖_p;  da = dy (u_ap - u_an), dp = -dy
    u_ap, dn = dy u_an where L > 0,

    with u = ∂d/∂x of each pair: (x - y + ε) / d for p = 2.

    Args:
        anchor, positive, negative: (D), (N, D) or (..., D), floating-point, broadcast to one shape.
            What is of another kind, and a broadcast along D that not all distances share, gives
            what stock gives.
        margin: greater than 0.
        p: the order of the norm; of 0 and below, stock's.
        swap: takes the nearer of d(a, n) and d(p, n) for d(a, n).
        reduction: "none" (a loss of shape (...)), "mean" or "sum". ``size_average`` and ``reduce``
            are its deprecated forms.

    Raises:
        ValueError: a margin that is not positive, an unknown reduction.
        RuntimeError: tensors of different numbers of dimensions, or of shapes that do not
            broadcast.
        TypeError: something is not a tensor.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    number = _Reduction.get_enum(reduction)
    if margin <= 0:
        raise ValueError(f"triplet_margin_loss: margin must be greater than 0, got {margin}")
    given = (anchor, positive, negative)
    if not all(isinstance(t, Tensor) for t in given):
        raise not_tensors("triplet_margin_loss", *given)
    if not anchor.dim() == positive.dim() == negative.dim():
        raise RuntimeError(
            "triplet_margin_loss: expected tensors of the same number of dimensions, got the "
            f"shapes {_shapes(*given)}"
        )
    if not all(t.is_floating_point() for t in given) or not p > 0 or _apart(*given, swap):
        return torch.nn.functional.triplet_margin_loss(
            *given, margin, p, eps, swap, reduction=reduction
        )
    a, b, n = same_dtype(*given)
    if not a.shape == b.shape == n.shape:
        a, b, n = torch.broadcast_tensors(a, b, n)
    if not a.dim():
        a, b, n = a.unsqueeze(0), b.unsqueeze(0), n.unsqueeze(0)
    return ops.triplet(a, b, n, float(margin), float(p), float(eps), bool(swap), number)


def _apart(a: Tensor, p: Tensor, n: Tensor, swap: bool) -> bool:
    """Whether the distances are of different numbers of components, or there is none: nothing that
    one shape could stand for."""
    if not a.dim():
        return False
    pairs = ((a, p), (a, n), (p, n)) if swap else ((a, p), (a, n))
    widths = {max(x.shape[-1], y.shape[-1]) for x, y in pairs}
    return len(widths) > 1 or 0 in (a.shape[-1], p.shape[-1], n.shape[-1])


@overridable
def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """L_i = -log(e^(s_ii) / Σ_j e^(s_ij)), s = q kᵀ / τ;  with G = (softmax(s) - I) / τ: dq = dy G
    k, dk = Gᵀ (dy q).

    The loss of contrastive predictive coding, CLIP and MoCo: cross-entropy that picks the positive
    of a query out of all its keys.

    Args:
        query, positive: (N, D), floating-point: row i of one belongs to row i of the other.
        negatives: None: the positives of the other rows. Else (M, D), everyone's, or (N, M, D),
            each row's own; and then these alone.
        temperature: τ, greater than 0. A tensor of one element is differentiated like any other
            (and not looked at on a GPU).
        symmetric: the mean of the loss and of that of ``positive`` as queries; not beside
            ``negatives``.
        normalize: divides each vector by its length first, so that s is made of cosines (by 1e-12
            where the length is less).
        reduction: "none" (N), "mean" or "sum".

    Raises:
        ValueError: a temperature that is not positive, an unknown reduction, ``symmetric`` beside
            ``negatives``.
        RuntimeError: shapes that do not fit, or tensors that are not floating-point.
        TypeError: something is not a tensor.
    """
    number = _Reduction.get_enum(reduction)
    learned = temperature if isinstance(temperature, Tensor) else None
    if (learned is None or learned.is_cpu) and not 0 < temperature < math.inf:
        raise ValueError(
            f"info_nce: temperature must be greater than 0 and finite, got {temperature}"
        )
    if symmetric and negatives is not None:
        raise ValueError("info_nce: symmetric takes the other rows for negatives, and no others")
    given = [query, positive] if negatives is None else [query, positive, negatives]
    if not all(isinstance(t, Tensor) for t in given):
        raise not_tensors("info_nce", *given)
    _check(*given)
    q, k, *n = same_dtype(*given)
    if normalize:
        q, k, *n = (unit_vectors(t, 1e-12) for t in (q, k, *n))
    if learned is not None:
        q, temperature = q / learned.to(q.dtype), 1.0
    return ops.info_nce(q, k, n[0] if n else None, float(temperature), bool(symmetric), number)


def _check(query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> None:
    if query.dim() != 2 or positive.shape != query.shape:
        raise RuntimeError(
            "info_nce: query and positive must be of one shape (N, D), got "
            f"{_shapes(query, positive)}"
        )
    if negatives is not None and (
        negatives.dim() not in (2, 3)
        or negatives.shape[-1] != query.shape[1]
        or (negatives.dim() == 3 and len(negatives) != len(query))
    ):
        raise RuntimeError(
            "info_nce: negatives must be of shape (M, D) or (N, M, D), got "
            f"{_shapes(query, positive, negatives)}"
        )
    for t in (query, positive, negatives):
        if t is not None and not t.is_floating_point():
            raise RuntimeError(
                f"info_nce: only real floating-point tensors are supported, got {t.dtype}"
            )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
