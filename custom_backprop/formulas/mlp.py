"""The gated MLP of language models (Shazeer, 2020): y = (f(x Wgᵀ) ∘ x Wuᵀ) Wdᵀ.

With a = x Wgᵀ + bg (the gate), b = x Wuᵀ + bu (the value), h = f(a) b and y = h Wdᵀ + bd, the chain
rule goes back through a linear layer, a gate and two linear layers:

    dh = dy Wd             dWd = dyᵀ h          dbd = Σ_rows dy
    da = dh b f'(a)        dWg = daᵀ x          dbg = Σ_rows da
    db = dh f(a)           dWu = dbᵀ x          dbu = Σ_rows db
    dx = da Wg + db Wu

f(a) and h follow from a and b by one elementwise pass, so a and b are all that backward needs of
the inner width; and a and b follow from x by two products.
"""

from __future__ import annotations

from torch import Tensor

from .gating import factors, gate, gate_backward
from .linear import linear, linear_backward, linear_jvp
from .precision import widen


def mlp(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    f: str, recompute: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y; a and b, or None for both if backward recomputes them."""
    a, b = linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias)
    y = linear(gate(a, b, 0, True, f), down_weight, down_bias)
    return (y, None, None) if recompute else (y, a, b)


def mlp_backward(
    dy: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    f: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, of the three weights and of the three biases; what is not needed may be
    anything. Without a and b, they are computed again."""
    if a is None or b is None:
        a, b = linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias)
    h = gate(a, b, 0, True, f)
    dh, d_down, d_down_bias = linear_backward(dy, h, down_weight, True, needs[3], needs[6])
    da, db = gate_backward(dh, a, b, 0, True, f, True, True)
    assert da is not None
    assert db is not None
    by_gate, d_gate, d_gate_bias = linear_backward(da, x, gate_weight, True, needs[1], needs[4])
    by_up, d_up, d_up_bias = linear_backward(db, x, up_weight, True, needs[2], needs[5])
    return by_gate + by_up, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias


def mlp_jvp(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, f: str, *tangents: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """ty = th Wdᵀ + h tWdᵀ + tbd, where th = ta b f'(a) + tb f(a)."""
    tx, t_gate, t_up, t_down, t_gate_bias, t_up_bias, t_down_bias = tangents
    a, b = linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias)
    ta = linear_jvp(x, gate_weight, tx, t_gate, t_gate_bias)
    tb = linear_jvp(x, up_weight, tx, t_up, t_up_bias)
    y, derivative = factors(widen(a), f)
    terms = [t * k for t, k in ((ta, derivative * b), (tb, y)) if t is not None]
    th = sum(terms[1:], terms[0]).to(x.dtype) if terms else None
    return linear_jvp(gate(a, b, 0, True, f), down_weight, th, t_down, t_down_bias)
