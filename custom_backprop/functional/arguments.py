"""What functions of several families ask of their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Number
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..backends.selection import is_autocast

F = TypeVar("F", bound=Callable[..., Any])


def gains_on_a_cpu(function: F) -> F:
    """Marks a function that saves memory or time on a CPU, too. There ATen's operators run either
    way: of all others a Function written in Python costs its 10 microseconds for nothing
    (benchmarks/results/cpu.md), and :func:`custom_backprop.patch` leaves stock's."""
    function.gains_on_a_cpu = True  # type: ignore[attr-defined]
    return function


def number(name: str, p: Any) -> float:
    """A parameter of the function ``name`` as a float.

    Raises:
        TypeError, RuntimeError: it is not a number, or is complex.
    """
    if isinstance(p, complex):
        raise RuntimeError(f"{name}: a parameter must be real, got {p}")
    if not isinstance(p, (Number, Tensor)) or (isinstance(p, Tensor) and p.requires_grad):
        raise TypeError(f"{name}: a parameter must be a Number, not {type(p).__name__}")
    return float(p)  # type: ignore[arg-type]


def not_tensors(name: str, *given: Any) -> TypeError:
    """The error of the function ``name`` where not all of these are tensors."""
    return TypeError(f"{name}: expected Tensors, got {', '.join(type(t).__name__ for t in given)}")


def not_a_tensor(name: str, which: str, given: Any) -> TypeError:
    """The error of the function ``name`` where its argument ``which`` is not a tensor."""
    return TypeError(f"{name}: {which} must be a Tensor, not {type(given).__name__}")


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """``reduction``, or what its deprecated forms say."""
    if size_average is None and reduce is None:
        return reduction
    return _Reduction.legacy_get_string(
        size_average, reduce, emit_warning=not torch.compiler.is_compiling()
    )


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of torch's type promotion: 0-D tensors have no say beside others."""
    given = [t for t in tensors if t is not None]
    if all(t.dtype == given[0].dtype for t in given):
        return given[0].dtype
    return functools.reduce(
        torch.promote_types, [t.dtype for t in given if t.dim()] or [t.dtype for t in given]
    )


def cast_to_one_dtype(*tensors: Tensor) -> bool:
    """Whether autocast will cast tensors of several dtypes to one: it is on, and none is float64,
    which it leaves."""
    return is_autocast(tensors[0]) and all(t.dtype != torch.float64 for t in tensors)


def same_dtype(*tensors: Any) -> Any:
    """The tensors (or None) in their common dtype."""
    dtype = common_dtype(*tensors)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def together(*tensors: Any) -> Any:
    """The tensors (or None) in one dtype and shape. Autograd sums the gradient of one that was
    expanded."""
    first = tensors[0]
    for t in tensors:
        if t is not None and (t.dtype != first.dtype or t.shape != first.shape):
            cast = same_dtype(*tensors)
            shapes = torch.broadcast_shapes(*[t.shape for t in cast if t is not None])
            return tuple([t if t is None else t.expand(shapes) for t in cast])
    return tensors


#: how many seeds dropout draws from
SEEDS = 2**63 - 1


def no_seed(name: str, x: Tensor, seed: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{name}: the seed must be one number of torch.int64 on {x.device}, got "
        f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
    )


def without_rows(input: Tensor) -> bool:
    """What stock is left to refuse, or to call NaN: no dimension, no classes, no real
    floating-point numbers."""
    return (
        not input.dim()
        or not input.shape[0 if input.dim() == 1 else 1]
        or not input.is_floating_point()
    )


def check_tensors(name: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raises TypeError, as stock does."""
    for which, t in (("input", input), ("target", target)):
        if not isinstance(t, Tensor):
            raise not_a_tensor(name, which, t)
    if not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an int, not {type(ignore_index).__name__}")


def check_classes(name: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    dims = input.dim()
    if dims == 1:
        if target.numel() != 1 or target.dim() > 1:
            raise ValueError(f"{_misfit(name, input, target)}: expected one class")
    elif not target.dim() or target.shape[0] != input.shape[0]:
        raise ValueError(f"{_misfit(name, input, target)}: the batch sizes differ")
    elif target.dim() != dims - 1 or (dims > 2 and target.shape[1:] != input.shape[2:]):
        hint = ""
        if dims > 2 and target.shape == input.shape[:-1]:
            hint = "; if the classes are in the last dimension: input.transpose(1, -1)"
        expected = (input.shape[0], *input.shape[2:])
        raise RuntimeError(f"{_misfit(name, input, target)}: expected {expected}{hint}")
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or dims > 2):
        raise RuntimeError(
            f"{name}: expected classes in int64 or, for an input of at most two dimensions, uint8, "
            f"got {target.dtype}"
        )
    if target.device != input.device:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, got {input.device} and {target.device}"
        )
    if weight is not None:
        check_weight(name, input, weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} is not differentiable with respect to the weight of classes, which "
                "requires grad"
            )


def _misfit(name: str, input: Tensor, target: Tensor) -> str:
    shapes = f"{tuple(target.shape)} does not fit an input of shape {tuple(input.shape)}"
    return f"{name}: a target of shape {shapes}"


def check_weight(name: str, input: Tensor, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise not_a_tensor(name, "weight", weight)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: weight must have the shape ({classes},), one number a class, got "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != input.dtype and not cast_to_one_dtype(input, weight):
        raise RuntimeError(
            f"{name}: expected a weight of the dtype of the input, {input.dtype}, got "
            f"{weight.dtype}"
        )


def by_rows(op: Callable[..., Tensor], input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """``op`` on (N, C) or (N, C, D): a single row is a batch of one, and d1, ..., dK are one
    dimension."""
    if target.dtype == torch.uint8:
        target = target.long()
    dims = input.dim()
    if dims == 2 or dims == 3:
        return op(input, target, *options)
    probabilities = target.is_floating_point()
    if dims == 1:
        t = target.unsqueeze(0) if probabilities else target.reshape(1)
        loss = op(input.unsqueeze(0), t, *options)
        return loss.squeeze(0) if loss.dim() else loss
    loss = op(input.flatten(2), target.flatten(2 if probabilities else 1), *options)
    return loss.view(input.shape[:1] + input.shape[2:]) if loss.dim() else loss
