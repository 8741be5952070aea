"""Primitives of dropout. ``philox`` says which words make the mask: see ``formulas/dropout.py``."""

from __future__ import annotations

import numpy
import torch

from ..formulas import dropout as formula
from ..formulas.precision import HALF
from .library import launcher, primitive, slices

_launch = launcher("dropout", "dropout")

#: elements whose words, of 4 bytes, are still in the cache when they are used
CHUNK = 2**16


def _in_chunks(x, seed, p, scale, add, instead):
    """m scale x + (add where kept, else instead), of words that are drawn in order."""
    y = torch.empty(x.shape, dtype=x.dtype)
    generator, bound = numpy.random.SFC64(int(seed)), formula.threshold(p) - 2**31
    flat, out = x.contiguous().view(-1), y.view(-1)
    for part in slices(x.numel(), 1, CHUNK):
        m, scaled = out[part], flat[part] * scale
        torch.ge(formula.drawn(generator, len(m)), bound, out=m)
        if add or instead:
            scaled.add_(add - instead)
        m.mul_(scaled)
        if add or instead:
            m.add_(instead)
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)


def _aten(x, residual, seed, p, alpha, features, philox):
    if philox or features or x.dtype in HALF:
        return formula.dropout(x, residual, seed, p, alpha, features, philox)
    y = _in_chunks(x, seed, p, *formula.coefficients(p, alpha))
    return y if residual is None else y + residual


def _aten_backward(dy, seed, p, alpha, features, philox, dtype):
    if philox or features or dy.dtype in HALF:
        return formula.dropout_backward(dy, seed, p, alpha, features, philox, dtype)
    return _in_chunks(dy, seed, p, formula.coefficients(p, alpha)[0], 0.0, 0.0).to(dtype)


def _forward(x, residual, seed, p, alpha, features, philox):
    if not philox:  # made by ATen, and the backend was changed since
        return formula.dropout(x, residual, seed, p, alpha, features, philox)
    numbers = formula.threshold(p), *formula.coefficients(p, alpha)
    return _launch(x, residual, seed, *numbers, features, formula.result_type(x, residual))


def _backward(dy, seed, p, alpha, features, philox, dtype):
    if not philox:
        return formula.dropout_backward(dy, seed, p, alpha, features, philox, dtype)
    factor = formula.coefficients(p, alpha)[0]
    return _launch(dy, None, seed, formula.threshold(p), factor, 0.0, 0.0, features, dtype)


forward = primitive(
    "dropout_forward(Tensor x, Tensor? residual, Tensor seed, float p, bool alpha, bool features, "
    "bool philox) -> Tensor",
    formula=formula.dropout,
    aten=_aten,
    triton=_forward,
    fake=lambda x, residual, *_: torch.empty_like(x, dtype=formula.result_type(x, residual)),
    traced="kernel",
)
backward = primitive(
    "dropout_backward(Tensor dy, Tensor seed, float p, bool alpha, bool features, bool philox, "
    "ScalarType dtype) -> Tensor",
    formula=formula.dropout_backward,
    aten=_aten_backward,
    triton=_backward,
    fake=lambda dy, *rest: torch.empty_like(dy, dtype=rest[-1]),
    traced="kernel",
)
