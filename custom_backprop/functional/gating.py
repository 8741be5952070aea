"""Gated linear units: y = f(a) b;  da = dy b f'(a), db = dy f(a).

Each takes the gate a and the value b as two tensors, or as the halves of one. Then ``gate_first``
says which half is the gate: the second in glu, as in torch, and in reglu and geglu; the first in
swiglu, as gated MLPs of language models pack them.

Args:
    input: a, or a tensor of both, floating-point.
    value: b, of the shape and dtype of a.
    dim: along which ``input`` is halved.

Raises:
    RuntimeError: an odd size along ``dim``, or two tensors that differ in shape or dtype.
    IndexError: ``dim`` is out of range.
    NotImplementedError: what is not floating-point.

Derivation: :mod:`custom_backprop.formulas.gating`.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import gating as ops
from ..ops.route import overridable

__all__ = ["geglu", "glu", "reglu", "swiglu"]

#: ``approximate`` -> the activation
GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@overridable
def glu(
    input: Tensor, dim: int = -1, value: Tensor | None = None, gate_first: bool = False
) -> Tensor:
    """y = σ(a) b;  da = dy b σ(a) (1 - σ(a)), db = dy σ(a)."""
    return _gate("glu", "sigmoid", input, value, dim, gate_first)


@overridable
def reglu(
    input: Tensor, value: Tensor | None = None, dim: int = -1, gate_first: bool = False
) -> Tensor:
    """y = max(a, 0) b;  da = dy b [a > 0], db = dy max(a, 0)."""
    return _gate("reglu", "relu", input, value, dim, gate_first)


@overridable
def geglu(
    input: Tensor, value: Tensor | None = None, dim: int = -1, gate_first: bool = False,
    approximate: str = "none",
) -> Tensor:  # fmt: skip
    """y = gelu(a) b;  da = dy b gelu'(a), db = dy gelu(a). ``approximate`` is "none" or "tanh", as
    of :func:`gelu`."""
    if approximate not in GELU:
        raise not_a_gelu("geglu", approximate)
    return _gate("geglu", GELU[approximate], input, value, dim, gate_first)


@overridable
def swiglu(
    input: Tensor, value: Tensor | None = None, dim: int = -1, gate_first: bool = True
) -> Tensor:
    """y = silu(a) b;  da = dy b σ(a) (1 + a (1 - σ(a))), db = dy silu(a)."""
    return _gate("swiglu", "silu", input, value, dim, gate_first)


def not_a_gelu(name: str, approximate: str) -> RuntimeError:
    """The error of the function ``name`` where ``approximate`` is not in :data:`GELU`."""
    return RuntimeError(f"{name}: approximate must be 'none' or 'tanh', got {approximate!r}")


def _gate(name, f, x, value, dim, gate_first):
    if value is not None and (value.shape != x.shape or value.dtype != x.dtype):
        raise RuntimeError(
            f"{name}: the gate and the value must have one shape and dtype, got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(value.shape)} {value.dtype}"
        )
    if value is None:
        count = x.dim() or 1
        if not -count <= dim < count:
            raise IndexError(f"{name}: dim {dim} is out of range for shape {tuple(x.shape)}")
        if not x.dim() or x.shape[dim] % 2:
            raise RuntimeError(
                f"{name}: the size of dim {dim} must be even, got shape {tuple(x.shape)}"
            )
        dim %= count
    if not x.is_floating_point():
        raise NotImplementedError(f"{name} is not implemented for {x.dtype}")
    return ops.gate(x, value, dim, gate_first, f)
