"""Primitives of the gated MLP, put together of those of the linear layer and of the gate.

With S(i) sharded along dimension i, R replicated and P a partial sum, it is computed shard by shard

    rows      x S(i), all weights R             ->  y S(i), a S(i),  b S(i)
    columns   x R, Wg S(0), Wu S(0), Wd S(1)    ->  y P,    a S(-1), b S(-1)

where in the second the inner units are cut, as in Megatron-LM (Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from ..formulas import mlp as formula
from ..formulas.precision import HALF
from . import gating, linear
from .activation import ATEN
from .library import P, R, launcher, primitive


def _over_dh(dh, a, b, f):
    """da and db; da is written over dh."""
    if dh.dtype in HALF:
        return gating.backward.aten(dh, a, b, 0, True, f, True, True)
    db = ATEN[f].forward(a).mul_(dh)
    return gating.OVER_DY[f](dh.mul_(b), a), db


#: gate_backward where its dy is memory of our own
_GATE_BACKWARD: dict[str, Callable[..., Any]] = {
    "aten": _over_dh,
    "triton": launcher("gating", "backward_"),
}


def _products(which, x, gate_weight, up_weight, gate_bias, up_bias):
    """a and b."""
    project = getattr(linear.forward, which)
    return project(x, gate_weight, gate_bias), project(x, up_weight, up_bias)


def _forward(
    which, x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, f, recompute
):
    """By the implementations ``which`` of the linear layer and of the gate."""
    a, b = _products(which, x, gate_weight, up_weight, gate_bias, up_bias)
    h = getattr(gating.forward, which)(a, b, 0, True, f)
    if recompute:
        a = b = None
    return getattr(linear.forward, which)(h, down_weight, down_bias), a, b


def _through(which, dy, x, weight, *needs):
    """dx, dW and db of a linear layer, those that are needed."""
    run = getattr(linear.backward, which)
    return run(dy, x, weight, *needs) if any(needs) else (None, None, None)


def _backward(
    which, dy, x, gate_weight, up_weight, down_weight, gate_bias, up_bias, a, b, f, needs
):
    need_x, need_gate, need_up, need_down, need_gate_bias, need_up_bias, need_down_bias = needs
    need_a, need_b = _inner_needs(needs)
    need_h = need_a or need_b
    if a is None and (need_h or need_down):
        a, b = _products(which, x, gate_weight, up_weight, gate_bias, up_bias)
    h = getattr(gating.forward, which)(a, b, 0, True, f) if need_down else None
    dh, d_down, d_down_bias = _through(which, dy, h, down_weight, need_h, need_down, need_down_bias)
    del h  # so that it does not stand beside da and db
    da = db = None
    if need_a and need_b and which in _GATE_BACKWARD:
        da, db = _GATE_BACKWARD[which](dh, a, b, f)
    elif need_h:
        da, db = getattr(gating.backward, which)(dh, a, b, 0, True, f, need_a, need_b)
    del dh, a, b
    dx, d_gate, d_gate_bias = _through(which, da, x, gate_weight, need_x, need_gate, need_gate_bias)
    of_b, d_up, d_up_bias = _through(which, db, x, up_weight, need_x, need_up, need_up_bias)
    dx = dx.add_(of_b) if need_x else None
    return dx, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias


def _inner_needs(needs):
    """Whether da and db are needed."""
    need_x, need_gate, need_up, _, need_gate_bias, need_up_bias, _ = needs
    return need_x or need_gate or need_gate_bias, need_x or need_up or need_up_bias


def _fake_forward(
    x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, f, recompute
):
    y = x.new_empty(*x.shape[:-1], down_weight.shape[0])
    if recompute:
        return y, None, None
    inner = (*x.shape[:-1], gate_weight.shape[0])
    return y, x.new_empty(inner), x.new_empty(inner)


def _fake_backward(
    dy, x, gate_weight, up_weight, down_weight, gate_bias, up_bias, a, b, f, needs
):  # fmt: skip
    hidden, features = gate_weight.shape
    shapes = [x.shape, (hidden, features), (hidden, features), down_weight.shape]
    shapes += [(hidden,), (hidden,), (down_weight.shape[0],)]
    return tuple(
        dy.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True)
    )


def _sharding(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, f, recompute):
    last = x.dim() - 1
    for i in range(last):
        kept = R if recompute else i
        yield [i, kept, kept], [i, R, R, R, R, R, R]
    kept = R if recompute else last
    yield [P, kept, kept], [R, 0, 0, 1, 0, 0, P]


def _backward_sharding(
    dy, x, gate_weight, up_weight, down_weight, gate_bias, up_bias, a, b, f, needs
):  # fmt: skip
    last = x.dim() - 1

    def wanted(*placements):
        return [p if need else R for p, need in zip(placements, needs, strict=True)]

    for i in range(last):
        yield wanted(i, P, P, P, P, P, P), [i, i, R, R, R, R, R, i, i]
    yield wanted(P, 0, 0, 1, 0, 0, R), [R, R, 0, 0, 1, 0, 0, last, last]


def _flops(x, gate_weight, up_weight, down_weight, *_):
    """x Wgᵀ, x Wuᵀ and h Wdᵀ."""
    return 2 * prod(x[:-1]) * (2 * prod(gate_weight) + prod(down_weight))


def _backward_flops(
    dy, x, gate_weight, up_weight, down_weight, gate_bias, up_bias, a, b, f, needs
):  # fmt: skip
    """Of the seven products below those that are needed, and x Wgᵀ and x Wuᵀ where they are
    computed again."""
    need_x, need_gate, need_up, need_down, *_ = needs
    need_a, need_b = _inner_needs(needs)
    again = a is None and (need_a or need_b or need_down)
    inner = 2 * need_x + need_gate + need_up + 2 * again
    outer = (need_a or need_b) + need_down
    return 2 * prod(dy[:-1]) * (inner * prod(gate_weight) + outer * prod(down_weight))


_WEIGHTS = "Tensor gate_weight, Tensor up_weight, Tensor down_weight"
_RESULTS = ", ".join(f"Tensor d{i}" for i in range(7))

forward = primitive(
    f"mlp_forward(Tensor x, {_WEIGHTS}, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str f, bool recompute) -> (Tensor y, Tensor a, Tensor b)",
    formula=formula.mlp,
    aten=partial(_forward, "aten"),
    triton=partial(_forward, "triton"),
    traced=partial(_forward, "traced"),
    fake=_fake_forward,
    sharding=_sharding,
    flops=_flops,
)
backward = primitive(
    f"mlp_backward(Tensor dy, Tensor x, {_WEIGHTS}, Tensor? gate_bias, Tensor? up_bias, "
    f"Tensor? a, Tensor? b, str f, bool[] needs) -> ({_RESULTS})",
    formula=formula.mlp_backward,
    aten=partial(_backward, "aten"),
    triton=partial(_backward, "triton"),
    traced=partial(_backward, "traced"),
    fake=_fake_backward,
    sharding=_backward_sharding,
    flops=_backward_flops,
)
