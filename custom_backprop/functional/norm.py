"""Layer and RMS normalization, as in ``torch.nn.functional``.

Derivations: :mod:`custom_backprop.formulas.norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..formulas.norm import CASTINGS
from ..formulas.precision import wide
from ..ops import norm as ops
from ..ops.route import overridable
from .arguments import gains_on_a_cpu, not_a_tensor, number

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = w x̂ + b, x̂ = r (x - μ), μ the mean and 1/r² the variance + ε of a row;  dx = r (g -
    Σ g / n - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂, db = Σ dy.

    Args:
        input: (..., *normalized_shape), floating-point. A row is what ``normalized_shape`` covers.
        weight, bias: of ``normalized_shape``; ones and zeros by default.

    Raises:
        RuntimeError: shapes that do not fit.
        NotImplementedError: an input that is not floating-point.
        TypeError: something is not a tensor, or ``normalized_shape`` is not a sequence of ints.
    """
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps, "layer")


@gains_on_a_cpu
@overridable
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    casting: str = "torch",
) -> Tensor:
    """y = w x̂, x̂ = r x, 1/r² the mean square + ε of a row;  dx = r (g - x̂ Σ g x̂ / n), g = w dy,
    dw = Σ dy x̂.

    Args:
        input: (..., *normalized_shape), floating-point. A row is what ``normalized_shape`` covers.
        weight: of ``normalized_shape``; ones by default.
        eps: default: the epsilon of the dtype that is computed in.
        casting: where half precision is rounded: "torch" once, at the end; "llama" before the
            weight, and the result has the dtype of the product; "gemma" once, and 1 + w stands for
            w, in every dtype.

    Raises:
        ValueError: another ``casting``.
        RuntimeError, NotImplementedError, TypeError: as :func:`layer_norm`.
    """
    return _norm("rms_norm", input, normalized_shape, weight, None, eps, casting)


@overridable
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(y, h), y = layer_norm(h), h = input + residual, in one pass;  dx = da = dx of the norm + dh.

    y comes first, as of every norm; h is the residual of the next block. Autocast casts nothing.

    Args:
        residual: of the shape and dtype of ``input``.
        input, normalized_shape, weight, bias, eps: as of :func:`layer_norm`.

    Raises:
        RuntimeError: another shape or dtype of ``residual``, or as of :func:`layer_norm`.
        NotImplementedError, TypeError: as of :func:`layer_norm`.
    """
    return _norm("add_layer_norm", input, normalized_shape, weight, bias, eps, "layer", (residual,))


@gains_on_a_cpu
@overridable
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    casting: str = "torch",
) -> tuple[Tensor, Tensor]:
    """(y, h), y = rms_norm(h), h = input + residual, in one pass;  dx = da = dx of the norm + dh.

    Args:
        residual: as of :func:`add_layer_norm`.
        input, normalized_shape, weight, eps, casting: as of :func:`rms_norm`.

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: as of :func:`rms_norm` and
            :func:`add_layer_norm`.
    """
    given = weight, None, eps, casting, (residual,)
    return _norm("add_rms_norm", input, normalized_shape, *given)


def _norm(name, x, shape, weight, bias, eps, kind, residual=()):
    """Of x, or of what it and a residual add up to."""
    if kind != "layer" and kind not in CASTINGS:
        raise ValueError(f"{name}: casting must be one of {', '.join(CASTINGS)}, got {kind!r}")
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, "input", x)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name}: normalized_shape must be a tuple of ints, not {shape!r}")
    n, shape = len(shape), tuple(shape)
    if not n:
        raise RuntimeError(f"{name}: normalized_shape must have at least one dimension, got []")
    if x.shape[-n:] != shape:
        raise RuntimeError(
            f"{name}: given normalized_shape={list(shape)}, expected an input of shape "
            f"(..., {', '.join(map(str, shape))}), got {tuple(x.shape)}"
        )
    for which, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise not_a_tensor(name, which, t)
        if t.shape != shape:
            raise RuntimeError(f"{name}: expected a {which} of shape {shape}, got {tuple(t.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"{name} is not implemented for {x.dtype}")
    if type(eps) is not float:
        default = eps is None and kind != "layer"
        eps = torch.finfo(wide(x.dtype)).eps if default else number(name, eps)
    for a in residual:
        if not isinstance(a, Tensor):
            raise not_a_tensor(name, "residual", a)
        if a.shape != x.shape or a.dtype != x.dtype:
            raise RuntimeError(
                f"{name}: expected a residual of shape {tuple(x.shape)} and {x.dtype}, got "
                f"{tuple(a.shape)} and {a.dtype}"
            )
    call = ops.add_norm if residual else ops.norm
    if n == 1:
        return call(x, *residual, weight, bias, eps, kind)
    # also where one of the dimensions is 0
    rows = [t.reshape(*x.shape[:-n], prod(shape)) for t in (x, *residual)]
    flat = [None if t is None else t.flatten() for t in (weight, bias)]
    if residual and all(t.requires_grad and t.is_leaf for t in (x, *residual)):
        # both get one gradient, and through views each would take it for its own
        rows[1].register_hook(lambda g: g if g is None else g.clone())
    found = call(*rows, *flat, eps, kind)
    return tuple([t.view(x.shape) for t in found]) if residual else found.view(x.shape)
