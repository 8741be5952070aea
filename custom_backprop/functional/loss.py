"""Pointwise losses, with the names and signatures of ``torch.nn.functional``.

Each compares ``input`` and ``target`` element by element and then, by ``reduction``, returns the
losses ("none"), averages ("mean") or sums them ("sum"); ``size_average`` and ``reduce`` are its
deprecated forms. Inputs of different dtypes meet in the wider one, and half precision is computed
in float32. What is not real and floating-point gives what stock gives. Derivations:
:mod:`custom_backprop.formulas.loss`.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..backends.selection import backend_of, is_autocast, is_traced, is_transformed
from ..formulas.loss import BATCHMEAN, SUM
from ..ops.loss import pointwise
from ..ops.route import overridable
from .arguments import common_dtype, gains_on_a_cpu, not_a_tensor, number, reduction_of, together

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
]


@gains_on_a_cpu
@overridable
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """l = w (x - t)²;  dx = 2 dy w (x - t), dt = -dx, dw = dy (x - t)². With a weight, the mean is
    Σ l / Σ w.

    Args:
        input, target: of one shape, or broadcast with a warning.
        weight: of the shape of ``input``.

    Raises:
        ValueError: an unknown reduction, or a weight of another shape.
        RuntimeError: shapes that do not broadcast.
    """
    return _difference(
        "mse_loss", input, target, reduction_of(size_average, reduce, reduction), weight
    )


@gains_on_a_cpu
@overridable
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """l = w |x - t|;  dx = dy w sign(x - t), dt = -dx, dw = dy |x - t|. Arguments and errors as
    :func:`mse_loss`."""
    return _difference(
        "l1_loss", input, target, reduction_of(size_average, reduce, reduction), weight
    )


@overridable
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """l = d² / 2β where |d| < β, else |d| - β/2, with d = x - t;  dx = dy min(max(d/β, -1), 1), dt
    = -dx. β = 0 is :func:`l1_loss`.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: shapes that do not broadcast, or a negative ``beta``.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    beta = number("smooth_l1_loss", beta)
    if beta == 0:
        return _difference("l1_loss", input, target, reduction, None)
    if beta < 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta, got {beta}")
    return _difference("smooth_l1_loss", input, target, reduction, None, beta=beta)


@overridable
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """l = w d²/2 where |d| <= δ, else w δ (|d| - δ/2), with d = x - t;  dx = dy w min(max(d, -δ),
    δ), dt = -dx, dw = dy l/w.

    The mean divides by the number of elements, also with a weight.

    Raises:
        ValueError: an unknown reduction, or a weight of another shape than ``input``.
        RuntimeError: shapes that do not broadcast, or a ``delta`` that is not positive.
    """
    delta = number("huber_loss", delta)
    if delta <= 0:
        raise RuntimeError(
            f"huber_loss does not support non-positive values for delta, got {delta}"
        )
    return _difference("huber_loss", input, target, reduction, weight, delta=delta)


@overridable
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """l = -w (t log x + (1 - t) log(1 - x)), logarithms at least -100;  dx = dy w (x - t) / (x (1 -
    x)), dt = dy w (log(1 - x) - log x).

    Args:
        input, target: probabilities, of one shape and dtype.
        weight: broadcast to that shape; not differentiated.

    Raises:
        ValueError: an unknown reduction, or different shapes.
        RuntimeError: different dtypes, a weight that requires grad or does not broadcast, or CUDA's
            autocast; on a CPU also a value outside [0, 1] (on a GPU, where looking would wait for
            it, such a value gives NaN).
    """
    reduction = reduction_of(size_average, reduce, reduction)
    enum = _Reduction.get_enum(reduction)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}) is deprecated. "
            "Please ensure they have the same size."
        )
    if not input.is_floating_point():
        return torch.nn.functional.binary_cross_entropy(input, target, weight, reduction=reduction)
    autocast = is_autocast(input)
    if autocast and input.is_cuda:
        raise RuntimeError(
            "binary_cross_entropy is unsafe to autocast: use "
            "binary_cross_entropy_with_logits, or disable autocast"
        )
    if not autocast and any(a is not None and a.dtype != input.dtype for a in (target, weight)):
        got = [a.dtype for a in (input, target, weight) if a is not None]
        raise RuntimeError(
            f"binary_cross_entropy: input, target and weight must have the same dtype, got {got}"
        )
    x, t, w = together(input, target, _constant("weight", weight, input))
    return pointwise("binary_cross_entropy", x, t, None, w, enum)


@overridable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """l = w (p t softplus(-x) + (1 - t) softplus(x));  dx = dy w ((1 - t) σ(x) - p t σ(-x)), dt =
    dy w ((p - 1) softplus(-x) - x).

    Args:
        input, target: logits and probabilities, of one shape.
        weight, pos_weight: w and p, broadcast to that shape; not differentiated.

    Raises:
        ValueError: an unknown reduction, or different shapes.
        RuntimeError: a weight that requires grad or does not broadcast.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    enum = _Reduction.get_enum(reduction)
    if target.size() != input.size():
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    if not (input.is_floating_point() and target.is_floating_point()):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            input, target, weight, reduction=reduction, pos_weight=pos_weight
        )
    w, p = _constant("weight", weight, input), _constant("pos_weight", pos_weight, input)
    x, t, p, w = together(input, target, p, w)
    return pointwise("binary_cross_entropy_with_logits", x, t, p, w, enum)


@gains_on_a_cpu
@overridable
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """l = t (log t - x), for x a log-probability;  dx = -dy t, dt = dy (log t - x + 1). With
    ``log_target`` t is one too: l = e^t (t - x).

    Args:
        input, target: of one shape, or broadcast.
        reduction: also "batchmean", the sum over the first dimension's length: the divergence as it
            is defined.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: shapes that do not broadcast, or a tensor that is not real and floating-point.
    """
    batchmean = reduction == "batchmean"
    if size_average is not None or reduce is not None:
        reduction = reduction_of(size_average, reduce, reduction)
    elif reduction == "mean":
        _warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size. "
            "'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition."
        )
    enum = SUM if reduction == "batchmean" else _Reduction.get_enum(reduction)
    if not isinstance(target, Tensor):
        raise not_a_tensor("kl_div", "target", target)
    if not (input.is_floating_point() and target.is_floating_point()):
        raise RuntimeError(
            f"kl_div: only real floating-point tensors are supported, got {input.dtype} and "
            f"{target.dtype}"
        )
    x, t = together(input, target)
    divided = batchmean and input.dim() > 0
    if divided and enum == SUM and x.shape == input.shape:
        return pointwise("kl_div", x, t, None, None, BATCHMEAN, log_target)
    loss = pointwise("kl_div", x, t, None, None, enum, log_target)
    return loss / input.shape[0] if divided else loss


@gains_on_a_cpu
@overridable
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """l = (log v + d²/v) / 2 with d = x - t, v = max(var, ε);  dx = dy d/v, dt = -dx, dvar = dy (1
    - d²/v) / 2v.

    Args:
        input, target: broadcast to one shape.
        var: of the shape of ``input``, or that without its last dimension, or with one dimension of
            length 1; or a number.
        full: adds the constant log(2π)/2.
        eps: bounds v from below; the bound is not differentiated.

    Raises:
        ValueError: an unknown reduction, a variance of another shape, or a negative one (not looked
            for while torch.compile traces or torch.func transforms: there it is bounded like any
            other; nor by the kernels on a GPU, where to look is to wait: there the loss and its
            gradients are NaN).
        RuntimeError: shapes that do not broadcast.
    """
    eps = number("gaussian_nll_loss", eps)
    if isinstance(var, float):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = torch.full_like(input, var)
    elif not isinstance(var, Tensor):
        raise TypeError(
            f"gaussian_nll_loss: var must be a Tensor or a float, not {type(var).__name__}"
        )
    elif _is_known(var) and torch.any(var < 0):
        raise ValueError("var has negative entry/entries")
    if var.size() != input.size():
        if input.size()[:-1] == var.size():
            var = var.unsqueeze(-1)
        elif (
            input.dim() != var.dim()
            or sum(v for x, v in zip(input.shape, var.shape, strict=True) if x != v) != 1
        ):
            raise ValueError(
                f"var is of incorrect size: {tuple(var.shape)} for an input of {tuple(input.shape)}"
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    if not (input.is_floating_point() and target.is_floating_point() and var.is_floating_point()):
        return torch.nn.functional.gaussian_nll_loss(input, target, var, full, eps, reduction)
    x, t, v = together(input, target, var)
    return pointwise("gaussian_nll_loss", x, t, v, None, _Reduction.get_enum(reduction), full, eps)


@gains_on_a_cpu
@overridable
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """l = e^x - t x;  dx = dy (e^x - t), dt = -dy x. Without ``log_input`` x is the rate: l = x - t
    log(x + ε), dx = dy (1 - t / (x + ε)).

    Args:
        input, target: broadcast to one shape.
        full: adds Stirling's approximation of log t! where t > 1.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: shapes that do not broadcast.
    """
    reduction = reduction_of(size_average, reduce, reduction)
    eps = number("poisson_nll_loss", eps)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not isinstance(target, Tensor):
        raise not_a_tensor("poisson_nll_loss", "target", target)
    if not common_dtype(input, target).is_floating_point:
        return torch.nn.functional.poisson_nll_loss(
            input, target, log_input, full, eps=eps, reduction=reduction
        )
    x, t = together(input, target)
    return pointwise(
        "poisson_nll_loss", x, t, None, None, _Reduction.get_enum(reduction), log_input, full, eps
    )


def _difference(
    name: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    **parameters: float,
) -> Tensor:
    """A loss of x - t, with a weight where torch has one."""
    if target.size() != input.size():
        _warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. Please ensure they "
            "have the same size."
        )
    x, t = together(input, target)
    if not x.is_floating_point():
        given = parameters if weight is None else {**parameters, "weight": weight}
        return getattr(torch.nn.functional, name)(x, t, reduction=reduction, **given)
    values = parameters.values()
    if weight is None:
        return pointwise(name, x, t, None, None, _Reduction.get_enum(reduction), *values)
    if weight.size() != input.size():
        raise ValueError(
            f"Weights and input must have the same size, got {tuple(weight.shape)} and "
            f"{tuple(input.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'."
        )
    x, t, w = together(x, t, weight)
    if reduction == "mean" and name != "huber_loss":
        return pointwise(name, x, t, None, w, SUM, *values) / weight.sum()
    return pointwise(name, x, t, None, w, _Reduction.get_enum(reduction), *values)


def _warn(message: str) -> None:
    """A warning at the call into this package; none from a graph that torch.compile traces."""
    if not torch.compiler.is_compiling():
        level, frame, root = 1, sys._getframe(), __name__.partition(".")[0]
        inner = f"{root}.functional.", f"{root}.ops."
        while frame.f_back is not None and frame.f_globals["__name__"].startswith(inner):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, stacklevel=level)


def _constant(name: str, weight: Tensor | None, input: Tensor) -> Tensor | None:
    """A weight that torch does not differentiate, in the shape of the input."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise not_a_tensor("the loss", name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the loss is not differentiable with respect to argument '{name}': it cannot have "
            "requires_grad True"
        )
    return weight if weight.shape == input.shape else weight.expand_as(input)


def _is_known(t: Tensor) -> bool:
    """Whether values can be looked at: not while a graph is traced or vmap runs, nor on the meta
    device; and on a GPU, where to look is to wait, not by kernels."""
    if is_traced() or is_transformed() or t.is_meta:
        return False
    return not (t.is_cuda and backend_of(t) == "triton")
