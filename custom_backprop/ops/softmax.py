"""Autograd of the softmaxes: what is kept is y alone."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.library import TENSORS
from ..backends.softmax import ATEN, ATEN_INTO, primitives
from ..formulas.softmax import SOFTMAXES, Softmax
from .function import differentiable, differentiated, is_stocks
from .reuse import LEAST, is_unseen, place


def _function(s: Softmax) -> Callable[..., Tensor]:
    run_forward, run_backward = primitives[s.name]
    kernels_forward, kernels_backward = run_forward.kernels, run_backward.kernels  # type: ignore[attr-defined]
    aten_forward, aten_backward = ATEN[s.name]
    aten_into = ATEN_INTO[s.name]
    formula_backward, jvp_of = s.backward, s.jvp

    class Definition:
        @staticmethod
        def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
            return run_forward(x, dim, dtype)

        @staticmethod
        def setup_context(
            ctx: Any, inputs: tuple[Tensor, int, torch.dtype | None], output: Tensor
        ) -> None:
            x, ctx.dim, _ = inputs
            ctx.dtype = x.dtype
            ctx.save_for_backward(output)
            ctx.save_for_forward(output)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> Any:
            if dy is None:
                return None, None, None
            (y,) = ctx.saved_tensors
            run = formula_backward if differentiated() else run_backward
            return run(dy, y, ctx.dim, ctx.dtype), None, None

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            (y,) = ctx.saved_tensors
            return jvp_of(tangent.to(y.dtype), y, ctx.dim)

        direct_value = staticmethod(aten_forward)

        @staticmethod
        def direct_forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
            y = aten_forward(x, dim, dtype)
            ctx.to_save, ctx.materialize_grads = (
                (y,),
                False,
            )  # what the methods set, without their frames
            ctx.dim, ctx.dtype = dim, x.dtype
            ctx.large = y.dtype == x.dtype and y.numel() >= LEAST
            ctx.may_take_saved = ctx.large and is_unseen()
            return y

        @staticmethod
        def direct_backward(ctx: Any, dy: Tensor) -> Any:
            (y,) = ctx.saved_tensors
            if ctx.large and (dx := place(ctx.references, dy, y, ctx.may_take_saved)) is not None:
                return aten_into(dx, dy, y, ctx.dim), None, None
            return aten_backward(dy, y, ctx.dim, ctx.dtype), None, None

        kernel_value = staticmethod(kernels_forward)

        @staticmethod
        def kernel_forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
            y = kernels_forward(x, dim, dtype)
            ctx.to_save, ctx.materialize_grads = (y,), False
            ctx.dim, ctx.dtype = dim, x.dtype
            return y

        @staticmethod
        def kernel_backward(ctx: Any, dy: Tensor) -> Any:
            return kernels_backward(dy, *ctx.saved_tensors, ctx.dim, ctx.dtype), None, None

    Definition.__name__ = s.name
    Definition.__doc__ = s.formula
    return differentiable(unary=True, overwrites=True)(Definition)


_FUNCTIONS = {s.name: _function(s) for s in SOFTMAXES.values()}


def apply(name: str, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """y along ``dim``, which may be negative, of x cast to ``dtype``. The cast is the kernel's own:
    no cast tensor is written.

    Raises:
        IndexError, TypeError, NotImplementedError: as :mod:`custom_backprop.functional.softmax`
            says.
    """
    if is_stocks(x):
        return getattr(torch.nn.functional, name)(x, dim, dtype=dtype)
    if type(x) not in TENSORS and has_torch_function((x,)):
        return handle_torch_function(apply, (x,), name, x, dim, dtype)
    count, dim = x.dim() or 1, index(dim)
    if not -count <= dim < count:
        given = f"{name} of shape {tuple(x.shape)}"
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-count}, {count - 1}], but got {dim}): {given}"
        )
    if not (
        x.is_floating_point() and (dtype is None or dtype.is_floating_point)
    ):  # has no gradient: stock's result, or stock's error
        return getattr(torch.nn.functional, name)(x, dim, dtype=dtype)
    if (
        dtype is None
        and x.is_cuda
        and torch.is_autocast_enabled("cuda")
        and x.dtype != torch.float64
    ):
        dtype = (
            torch.float32
        )  # what autocast on a GPU does to torch's own; on a CPU it does nothing
    if x.dim() == 0:
        return _FUNCTIONS[name](x.reshape(1), 0, dtype).reshape(())
    return _FUNCTIONS[name](x, dim % count, dtype)
