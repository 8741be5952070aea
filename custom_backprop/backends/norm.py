"""Primitives of layer_norm and rms_norm, on x (..., n).

Stock has no fused backward of rms_norm on a CPU. Ours is that of layer_norm with a mean of 0, which
takes out one sum too much, and that sum given back.
"""

from __future__ import annotations

import torch

from ..formulas import norm as formula
from ..formulas.precision import HALF, wide
from .library import P, R, builtin, launcher, primitive

aten = torch.ops.aten
_layer_norm = builtin(aten.native_layer_norm)
_layer_norm_backward = builtin(aten.native_layer_norm_backward)
_vector_norm = builtin(aten.linalg_vector_norm)


def _forward(x, weight, bias, eps, kind):
    if not x.numel() or x.dtype in HALF:
        return formula.norm(x, weight, bias, eps, kind)  # ATen's statistics would be of x's dtype
    if kind == "layer":
        return _layer_norm(x, x.shape[-1:], weight, bias, eps)
    w = weight if weight is None or kind != "gemma" else formula.factor(weight, kind)
    if w is not None and w.dtype != x.dtype:
        return formula.norm(x, weight, bias, eps, kind)
    norm = _vector_norm(x, 2, (-1,), True)  # ATen's rms_norm writes x²
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * rstd
    return y if w is None else y.mul_(w), None, rstd


def _backward(dy, x, weight, mean, rstd, kind, *needs):
    w = weight if weight is None or kind == "layer" else formula.factor(weight, kind)
    if not x.numel() or x.dtype in HALF or (w is not None and w.dtype != x.dtype):
        return formula.norm_backward(dy, x, weight, mean, rstd, kind, *needs)
    rstd = rstd.contiguous()  # ATen reads statistics as if they were
    mean = mean.contiguous() if kind == "layer" else torch.zeros_like(rstd)
    # of a bias it reads no more than whether there is one
    like = x.new_empty(x.shape[-1:]) if w is None else w
    dx, dw, db = _layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, w, like if needs[2] else None, needs
    )
    if needs[0] and kind != "layer":  # r Σ g / n, which it took out
        total = dy.sum(-1) if w is None else dy @ w
        dx.addcmul_(total.unsqueeze(-1), rstd, value=1 / x.shape[-1])
    return dx, dw if needs[1] else None, db if needs[2] else None


def _add_forward(x, residual, weight, bias, eps, kind):
    h = (x + residual).contiguous()
    y, *statistics = _forward(h, weight, bias, eps, kind)
    return y, h, *statistics


def _add_backward(dy, dh, h, weight, mean, rstd, kind, *needs):
    if h.dtype in HALF:
        return formula.add_norm_backward(dy, dh, h, weight, mean, rstd, kind, *needs)
    dx, dw, db = _backward(dy, h, weight, mean, rstd, kind, *needs)
    return dx if dx is None or dh is None else dx.add_(dh), dw, db


def _fake(x, weight, bias, eps, kind):
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype)) for _ in range(2))
    y = x.new_empty(x.shape, dtype=formula.dtype_of(x, weight, kind))
    return y, mean if kind == "layer" else None, rstd


def _fake_backward(dy, x, weight, mean, rstd, kind, *needs):
    like = x if weight is None else weight
    grads = (x, x.shape), (like, x.shape[-1:]), (like, x.shape[-1:])
    pairs = zip(grads, needs, strict=True)
    return tuple(t.new_empty(shape) if need else None for (t, shape), need in pairs)


def _fake_add(x, residual, weight, bias, eps, kind):
    y, *statistics = _fake(x, weight, bias, eps, kind)
    return y, x.new_empty(x.shape), *statistics


def _fake_add_backward(dy, dh, h, *rest):
    return _fake_backward(dy, h, *rest)


def _sharding(x, weight, bias, eps, kind):
    """By rows: a row's sum knows no shard of it."""
    return (([i, i if kind == "layer" else R, i], [i, R, R]) for i in range(x.dim() - 1))


def _backward_sharding(dy, x, weight, mean, rstd, kind, *needs):
    for i in range(dy.dim() - 1):
        grads = [lies if need else R for lies, need in zip((i, P, P), needs, strict=True)]
        yield grads, [i, i, R, i if kind == "layer" else R, i]


def _add_sharding(x, residual, weight, bias, eps, kind):
    for (y, *statistics), (row, *parameters) in _sharding(x, weight, bias, eps, kind):
        yield [y, y, *statistics], [row, row, *parameters]


def _add_backward_sharding(dy, dh, h, *rest):
    for grads, (row, *others) in _backward_sharding(dy, h, *rest):
        yield grads, [row, row, *others]


forward = primitive(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, str kind) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    formula=formula.norm,
    aten=_forward,
    triton=launcher("norm", "forward"),
    fake=_fake,
    sharding=_sharding,
)
backward = primitive(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? mean, Tensor rstd, str kind, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.norm_backward,
    aten=_backward,
    triton=launcher("norm", "backward"),
    fake=_fake_backward,
    sharding=_backward_sharding,
)
add_forward = primitive(
    "add_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
    "str kind) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    formula=formula.add_norm,
    aten=_add_forward,
    triton=launcher("norm", "add_forward"),
    fake=_fake_add,
    sharding=_add_sharding,
)
add_backward = primitive(
    "add_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? mean, "
    "Tensor rstd, str kind, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.add_norm_backward,
    aten=_add_backward,
    triton=launcher("norm", "add_backward"),
    fake=_fake_add_backward,
    sharding=_add_backward_sharding,
)
