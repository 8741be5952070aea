"""Where nothing wants a gradient there is nothing of ours to add: on a CPU, stock's own function answers, at the cost of one look."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from ..backends import selection
from ..backends.library import BY_ATEN, TENSORS, functorch_active

F = TypeVar("F", bound=Callable[..., Any])

_FULL_PRECISION = (torch.float32, torch.float64)


def stock_without_gradient(stock: Callable[..., Any], tensors: int = 1, options: tuple[str, ...] | None = None) -> Callable[[F], F]:
    """Decorator: calls ``stock`` instead where backward, forward mode and torch.func have no part, and no other backend is asked for.

    Only for a function whose values stock computes as we do, as quickly.

    Args:
        stock: of the same signature.
        tensors: how many tensors it takes, which come first. Two of different dtypes or in half precision, or more arguments by position,
            are left to the function itself.
        options: of a function of two tensors of one shape, what stock may be given by name. The rest makes it warn, of a caller that
            would be this module.
    """

    names = frozenset(options or ())

    def decorate(function: F) -> F:
        def of_one(input: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                type(input) in TENSORS
                and not (input.requires_grad or functorch_active())
                and input.is_cpu
                and selection._forced in BY_ATEN
                and forward_ad._current_level < 0
            ):
                return stock(input, *args, **kwargs)
            return function(input, *args, **kwargs)

        def of_two(input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                type(input) in TENSORS
                and type(other) in TENSORS
                and not (input.requires_grad or other.requires_grad or args or functorch_active())
                and input.is_cpu
                and other.is_cpu
                and input.dtype is other.dtype
                and input.dtype in _FULL_PRECISION
                and selection._forced in BY_ATEN
                and forward_ad._current_level < 0
                and (not kwargs if options is None else input.shape == other.shape and kwargs.keys() <= names)
            ):
                return stock(input, other, **kwargs)
            return function(input, other, *args, **kwargs)

        return functools.wraps(function)(of_one if tensors == 1 else of_two)  # type: ignore[return-value]

    return decorate
