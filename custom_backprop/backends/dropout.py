"""Primitives of dropout. ``philox`` says which words make the mask: see ``formulas/dropout.py``."""

from __future__ import annotations

import numpy
import torch

from ..formulas import dropout as formula
from ..formulas.precision import wide
from . import tasks
from .library import launcher, primitive

_launch = launcher("dropout", "dropout")

#: elements whose words, of 4 bytes, are still in the cache when they are used
CHUNK = 2**16


def _chunks(t):
    return t.contiguous().view(-1).split(CHUNK)


def _in_chunks(x, residual, seed, p, scale, add, instead, dtype):
    """m scale x + (add where kept, else instead), plus the residual."""
    y = torch.empty(x.shape, dtype=dtype)
    generator, bound = numpy.random.SFC64(int(seed)), formula.threshold(p) - 2**31
    chunks = _chunks(x)
    residuals = [None] * len(chunks) if residual is None else _chunks(residual)
    words = (formula.drawn(generator, len(a)) for a in chunks)  # in the order of the chunks

    def work(chunk, _):
        a, r, out, w = chunk
        t = a.to(wide(x.dtype)) * scale
        m = torch.ge(w, bound, out=torch.empty_like(t))
        if add or instead:
            t.add_(add - instead).mul_(m).add_(instead)
        else:
            t.mul_(m)
        out.copy_(t) if r is None else torch.add(t, r, out=out)

    tasks.each(x.device, work, zip(chunks, residuals, _chunks(y), words, strict=True))
    return y if x.is_contiguous() else torch.empty_like(x, dtype=dtype).copy_(y)


def _of_channels(x, seed, p, scale, add, instead):
    """One m for each (i, j): one pass over x, in alpha dropout a second one in place. In chunks, to
    wake another thread would take as long as the pass."""
    m = formula.mask(seed, x.shape, p, True, False).to(wide(x.dtype))
    y = x * (m * scale)
    if add or instead:
        y.add_(m * (add - instead) + instead)
    return y.to(x.dtype)


def _aten(x, residual, seed, p, alpha, features, philox):
    if philox or (features and residual is not None):
        return formula.dropout(x, residual, seed, p, alpha, features, philox)
    numbers = formula.coefficients(p, alpha)
    if features:
        return _of_channels(x, seed, p, *numbers)
    return _in_chunks(x, residual, seed, p, *numbers, formula.result_type(x, residual))


def _aten_backward(dy, seed, p, alpha, features, philox, dtype):
    if philox or features:
        return formula.dropout_backward(dy, seed, p, alpha, features, philox, dtype)
    return _in_chunks(dy, None, seed, p, formula.coefficients(p, alpha)[0], 0.0, 0.0, dtype)


def _forward(x, residual, seed, p, alpha, features, philox):
    # made by ATen, and the backend was changed since; or what no function combines
    if not philox or (features and residual is not None):
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
