"""Primitives of layer_norm and rms_norm, on x (..., n).

Stock has no fused backward of rms_norm on a CPU. Ours walks in chunks of rows that stay in cache:
memory sees one reading of x and dy and one writing of dx.
"""

from __future__ import annotations

import torch

from ..formulas import norm as formula
from ..formulas.linear import rows
from ..formulas.precision import HALF, wide, widen
from .library import P, R, launcher, primitive

aten = torch.ops.aten

#: elements of a chunk: half a MiB of float32, of which a handful of tensors stay in cache
CHUNK = 2**17


def _forward(x, weight, bias, eps, kind):
    if not x.numel() or (x.dtype in HALF and kind in ("layer", "llama")):
        return formula.norm(x, weight, bias, eps, kind)  # ATen's statistics would be of x's dtype
    if kind == "layer":
        return aten.native_layer_norm.default(x, x.shape[-1:], weight, bias, eps)
    w = weight if weight is None or kind != "gemma" else formula.factor(weight, kind)
    if w is not None and w.dtype != x.dtype:
        return formula.norm(x, weight, bias, eps, kind)
    y, rstd = aten._fused_rms_norm.default(x, x.shape[-1:], w, eps)
    return y, None, rstd


def _backward(dy, x, weight, mean, rstd, kind, *needs):
    if not x.numel() or (x.dtype in HALF and kind == "layer"):
        return formula.norm_backward(dy, x, weight, mean, rstd, kind, *needs)
    if kind == "layer":
        has_bias = weight if needs[2] else None  # ATen reads no more of it
        mean, rstd = mean.contiguous(), rstd.contiguous()  # it reads them as if they were
        return aten.native_layer_norm_backward.default(
            dy, x, x.shape[-1:], mean, rstd, weight, has_bias, needs
        )
    need_x, need_weight, _ = needs
    n, w = x.shape[-1], None if weight is None else formula.factor(weight, kind)
    dx, dw = x.new_empty(x.shape), x.new_zeros(n, dtype=rstd.dtype)
    mean = x.new_full((n,), 1 / n, dtype=rstd.dtype) if w is None else w.to(rstd.dtype) / n
    step = max(1, CHUNK // n)
    chunks = zip(*(rows(t).split(step) for t in (dy, x, rstd, dx)), strict=True)
    for dy_, x_, r, dx_ in chunks:
        dy_, unit = widen(dy_), torch.mul(widen(x_), r)
        along = dy_ * unit  # Σ g x̂ / n is its product with w / n, and dw its sum over the rows
        if need_weight:
            dw += along.sum(0)
        if need_x:
            c = along.mv(mean).unsqueeze(1)
            g = torch.sub(dy_ if w is None else torch.mul(dy_, w, out=along), unit.mul_(c))
            torch.mul(g, r, out=dx_) if dx.dtype == g.dtype else dx_.copy_(g.mul_(r))
    return dx if need_x else None, dw.to(weight.dtype) if need_weight else None, None


def _fake(x, weight, bias, eps, kind):
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype)) for _ in range(2))
    y = x.new_empty(x.shape, dtype=formula.dtype_of(x, weight, kind))
    return y, mean if kind == "layer" else None, rstd


def _fake_backward(dy, x, weight, mean, rstd, kind, *needs):
    like = x if weight is None else weight
    grads = (x, x.shape), (like, x.shape[-1:]), (like, x.shape[-1:])
    pairs = zip(grads, needs, strict=True)
    return tuple(t.new_empty(shape) if need else None for (t, shape), need in pairs)


def _sharding(x, weight, bias, eps, kind):
    """By rows: a row's sum knows no shard of it."""
    return (([i, i if kind == "layer" else R, i], [i, R, R]) for i in range(x.dim() - 1))


def _backward_sharding(dy, x, weight, mean, rstd, kind, *needs):
    for i in range(dy.dim() - 1):
        grads = [lies if need else R for lies, need in zip((i, P, P), needs, strict=True)]
        yield grads, [i, i, R, i if kind == "layer" else R, i]


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
