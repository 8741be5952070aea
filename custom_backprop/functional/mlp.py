"""The gated MLP of language models: y = (f(x Wgᵀ + bg) ∘ (x Wuᵀ + bu)) Wdᵀ + bd, in one Function.

Backward needs the two products a = x Wgᵀ + bg and b = x Wuᵀ + bu, and makes f(a) and f(a) b again:
half of what autograd saves for the same layers. With ``recompute`` it makes a and b again too, for
two more products, and only x is saved. (``torch.compile`` decides itself what it makes again.)

Args:
    input: (..., features).
    gate_weight, up_weight: (hidden, features).
    down_weight: (out_features, hidden).
    gate_bias, up_bias: (hidden), or None for both.
    down_bias: (out_features), or None.
    recompute: whether backward makes a and b again.

Returns:
    (..., out_features).

Raises:
    RuntimeError: shapes, dtypes or devices do not fit, or what is not floating-point.
    TypeError: one is not a tensor.

Derivation: :mod:`custom_backprop.formulas.mlp`.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import mlp as ops
from ..ops.route import overridable
from .arguments import cast_to_one_dtype, not_tensors
from .gating import GELU, not_a_gelu

__all__ = ["geglu_mlp", "swiglu_mlp"]


@overridable
def swiglu_mlp(
    input: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor,
    gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """y = (silu(a) b) Wdᵀ;  dh = dy Wd, da = dh b σ(a) (1 + a (1 - σ(a))), db = dh silu(a),
    dx = da Wg + db Wu."""
    return _mlp(
        "swiglu_mlp", "silu", recompute,
        input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias,
    )  # fmt: skip


@overridable
def geglu_mlp(
    input: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor,
    gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, approximate: str = "none", recompute: bool = False,
) -> Tensor:  # fmt: skip
    """y = (gelu(a) b) Wdᵀ;  dh = dy Wd, da = dh b gelu'(a), db = dh gelu(a), dx = da Wg + db Wu.
    ``approximate`` is "none" or "tanh", as of :func:`gelu`."""
    if approximate not in GELU:
        raise not_a_gelu("geglu_mlp", approximate)
    return _mlp(
        "geglu_mlp", GELU[approximate], recompute,
        input, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias,
    )  # fmt: skip


def _mlp(
    name: str, f: str, recompute: bool, x: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    biases = [b for b in (gate_bias, up_bias, down_bias) if b is not None]
    given = (x, gate, up, down, *biases)
    if not all(isinstance(t, Tensor) for t in given):
        raise not_tensors(name, *given)
    fit = gate.dim() == down.dim() == 2 and up.shape == gate.shape and x.dim() > 0
    if not fit or x.shape[-1] != gate.shape[1] or down.shape[1] != gate.shape[0]:
        raise RuntimeError(
            f"{name}: an input of shape {tuple(x.shape)} and weights of shapes "
            f"{tuple(gate.shape)} (gate), {tuple(up.shape)} (up) and {tuple(down.shape)} (down) do "
            "not fit: expected (..., features), twice (hidden, features) and (out, hidden)"
        )
    for bias, weight in ((gate_bias, gate), (up_bias, up), (down_bias, down)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"{name}: a bias of shape {tuple(bias.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)}"
            )
    if not x.is_floating_point():
        raise RuntimeError(f"{name} is not implemented for {x.dtype}")
    if any(t.device != x.device for t in given):
        got = ", ".join(str(t.device) for t in given)
        raise RuntimeError(f"{name}: expected all tensors on one device, got {got}")
    if any(t.dtype != x.dtype for t in given) and not cast_to_one_dtype(*given):
        got = ", ".join(str(t.dtype) for t in given)
        raise RuntimeError(f"{name}: all tensors must have the same dtype, got {got}")
    if x.dim() == 1:  # as a row: what comes of it is then a view that autograd knows
        x = x.unsqueeze(0)
        y = ops.gated_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, f, recompute)
        return y.squeeze(0)
    return ops.gated_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, f, recompute)
