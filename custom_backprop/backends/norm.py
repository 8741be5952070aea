"""Primitives of layer_norm and rms_norm, on x (..., n).

Stock has no fused backward of rms_norm on a CPU. Ours walks in chunks of rows that stay in cache:
memory sees one reading of x and dy and one writing of dx.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formulas import norm as formula
from ..formulas.linear import rows
from ..formulas.precision import HALF, wide, widen
from .library import P, Placement, R, Sharding, empty_if, launcher, primitive

aten = torch.ops.aten

#: elements of a chunk: half a MiB of float32, of which a handful of tensors stay in cache
CHUNK = 2**17


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if not x.numel() or x.dtype in HALF:  # ATen's statistics would be of x's dtype
        return formula.layer_norm(x, weight, bias, eps)
    y, mean, rstd = aten.native_layer_norm.default(x, x.shape[-1:], weight, bias, eps)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *needs: bool
) -> Any:
    if not x.numel() or x.dtype in HALF:
        return formula.layer_norm_backward(dy, x, weight, mean, rstd, *needs)
    mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    # of a bias ATen reads whether there is one
    return aten.native_layer_norm_backward.default(
        dy, x, x.shape[-1:], mean, rstd, weight, weight if needs[2] else None, needs
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of as many rows, cut alike."""
    return zip(*(t.split(max(1, CHUNK // tensors[0].shape[1])) for t in tensors), strict=True)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, casting: str) -> tuple[Tensor, Tensor]:
    w = formula.factor(weight, casting) if casting == "gemma" else weight
    rounded = casting == "llama" and x.dtype in HALF
    if not x.numel() or rounded or (w is not None and w.dtype != x.dtype):
        return formula.rms_norm(x, weight, eps, casting)
    y, rstd = aten._fused_rms_norm.default(x, x.shape[-1:], w, eps)
    return y, rstd.squeeze(-1)


def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    casting: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if not x.numel():
        return formula.rms_norm_backward(dy, x, weight, rstd, casting, need_x, need_weight)
    n, w = x.shape[-1], formula.factor(weight, casting)
    dx, dw = x.new_empty(x.shape), x.new_zeros(n, dtype=rstd.dtype)
    mean = x.new_full((n,), 1 / n, dtype=rstd.dtype) if w is None else w.to(rstd.dtype) / n
    for dy_, x_, r, dx_ in _chunks(rows(dy), rows(x), rstd.reshape(-1, 1), rows(dx)):
        dy_, unit = widen(dy_), torch.mul(widen(x_), r)
        along = dy_ * unit  # Σ g x̂ / n is its product with w / n, and dw its sum over the rows
        if need_weight:
            dw += along.sum(0)
        if need_x:
            c = along.mv(mean).unsqueeze(1)
            g = torch.sub(dy_ if w is None else torch.mul(dy_, w, out=along), unit.mul_(c))
            torch.mul(g, r, out=dx_) if dx.dtype == g.dtype else dx_.copy_(g.mul_(r))
    dw_ = dw.to(weight.dtype) if need_weight and weight is not None else None
    return dx if need_x else None, dw_


def _sharding(statistics: int, parameters: int) -> Any:
    """By rows: a row's sum knows no shard of it."""
    return lambda x, *rest: (
        ([i] * (1 + statistics), [i] + [R] * parameters) for i in range(x.dim() - 1)
    )


def _backward_sharding(statistics: int) -> Any:
    def sharding(dy: Tensor, *rest: Any) -> Iterable[Sharding]:
        needs = [a for a in rest if isinstance(a, bool)]
        for i in range(dy.dim() - 1):
            grads: list[Placement] = [i, P, P]
            outputs = [lies if need else R for lies, need in zip(grads, needs, strict=False)]
            yield outputs, [i, i, R, *[i] * statistics]

    return sharding


def _fake(statistics: int, dtype: Any = lambda x, *rest: x.dtype) -> Any:
    def fake(x: Tensor, *rest: Any) -> Any:
        of_row = [x.new_empty(x.shape[:-1], dtype=wide(x.dtype)) for _ in range(statistics)]
        return x.new_empty(x.shape, dtype=dtype(x, *rest)), *of_row

    return fake


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    needs = [a for a in rest if isinstance(a, bool)]
    parameters = [
        empty_if(need, x.new_empty(x.shape[-1:]) if weight is None else weight)
        for need in needs[1:]
    ]
    return x.new_empty(x.shape) if needs[0] else None, *parameters


def _dtype_of_rms_norm(x: Tensor, weight: Tensor | None, eps: float, casting: str) -> torch.dtype:
    if casting == "llama" and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


layer_norm = primitive(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    formula=formula.layer_norm,
    aten=_layer_norm,
    triton=launcher("norm", "layer_norm_forward"),
    fake=_fake(2),
    sharding=_sharding(2, 2),
)
layer_norm_backward = primitive(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.layer_norm_backward,
    aten=_layer_norm_backward,
    triton=launcher("norm", "layer_norm_backward"),
    fake=_fake_backward,
    sharding=_backward_sharding(2),
)
rms_norm = primitive(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, str casting) -> (Tensor y, Tensor rstd)",
    formula=formula.rms_norm,
    aten=_rms_norm,
    triton=launcher("norm", "rms_norm_forward"),
    fake=_fake(1, _dtype_of_rms_norm),
    sharding=_sharding(1, 1),
)
rms_norm_backward = primitive(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, str casting, "
    "bool need_x, bool need_weight) -> (Tensor dx, Tensor dw)",
    formula=formula.rms_norm_backward,
    aten=_rms_norm_backward,
    triton=launcher("norm", "rms_norm_backward"),
    fake=_fake_backward,
    sharding=_backward_sharding(1),
)
