"""The short ways, each at the cost of one look at the arguments.

Where nothing wants a gradient on a CPU there is nothing of ours to add, and stock's own function
answers. Where a loss of two plain tensors is to be trained on, its direct face does, or on a GPU
that by kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from ..backends import selection
from ..backends.library import BY_ATEN, TENSORS, autocast_active, functorch_active, modes
from ..backends.selection import takes_kernels
from ..formulas.loss import MEAN, SUM
from ..ops.reuse import is_unseen

F = TypeVar("F", bound=Callable[..., Any])

_FULL_PRECISION = (torch.float32, torch.float64)

_grad_enabled = torch.is_grad_enabled
_tracing = torch.compiler.is_dynamo_compiling


def stock_without_gradient(
    stock: Callable[..., Any],
    tensors: int = 1,
    options: tuple[str, ...] | None = None,
    direct: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    parameters: tuple[Any, ...] = (),
) -> Callable[[F], F]:
    """Decorator: calls ``stock`` instead where backward, forward mode and torch.func have no part,
    and no other backend is asked for.

    Only for a function whose values stock computes as we do, as quickly.

    Args:
        stock: of the same signature.
        tensors: how many tensors it takes, which come first. Two of different dtypes or in half
            precision, or more arguments by position, are left to the function itself.
        options: of a function of two tensors of one shape, what stock may be given by name. The
            rest makes it warn, of a caller that would be this module.
        direct: of a loss of two tensors, its direct face, which takes the call if nothing but the
            reduction is given, and on a GPU that by kernels.
        parameters: what these faces take last: the defaults of the loss.
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
                and not (args or functorch_active())
                and input.dtype is other.dtype
                and input.dtype in _FULL_PRECISION
                and forward_ad._current_level < 0
                and (
                    not kwargs
                    if options is None
                    else input.shape == other.shape and kwargs.keys() <= names
                )
            ):
                on_cpu = input.is_cpu and other.is_cpu and selection._forced in BY_ATEN
                if on_cpu and not (input.requires_grad or other.requires_grad):
                    return stock(input, other, **kwargs)
                if (
                    direct is not None
                    and input.requires_grad
                    and _grad_enabled()
                    and not (_tracing() or modes() or autocast_active())
                    and (reduction := kwargs.get("reduction", "mean")) in ("mean", "sum")
                    and len(kwargs) == ("reduction" in kwargs)
                    and is_unseen()
                    and (on_cpu or (takes_kernels(input) and input.device == other.device))
                ):
                    return direct[not on_cpu](
                        input,
                        other,
                        None,
                        None,
                        MEAN if reduction == "mean" else SUM,
                        True,
                        *parameters,
                    )
            return function(input, other, *args, **kwargs)

        return functools.wraps(function)(of_one if tensors == 1 else of_two)  # type: ignore[return-value]

    return decorate
