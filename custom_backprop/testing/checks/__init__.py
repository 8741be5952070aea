"""The checks of :func:`validate`. Each is a function of one :class:`Case`; its docstring says which
bug it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..case import Case
from .batching import batched, hessian, jacobians, vmap
from .derivatives import forward_mode, gradcheck, gradgradcheck
from .kernels import compiles, memory
from .layouts import input_layouts, layouts
from .ownership import freed, inputs_unchanged, subsets, two_backwards
from .precision import autocast, precision, sweep
from .search import shapes, strides
from .traced import compile, opcheck
from .values import float64, forward, gradient

#: every check by name, in the order in which they run
CHECKS: dict[str, Callable[[Case], Any]] = {
    check.__name__: check
    for check in (
        float64,
        forward,
        gradient,
        gradcheck,
        gradgradcheck,
        forward_mode,
        batched,
        vmap,
        jacobians,
        hessian,
        opcheck,
        compile,
        layouts,
        input_layouts,
        strides,
        shapes,
        inputs_unchanged,
        two_backwards,
        freed,
        subsets,
        memory,
        compiles,
        autocast,
        precision,
        sweep,
    )
}

__all__ = [
    "CHECKS",
    "autocast",
    "batched",
    "compile",
    "compiles",
    "float64",
    "forward",
    "forward_mode",
    "freed",
    "gradcheck",
    "gradgradcheck",
    "gradient",
    "hessian",
    "input_layouts",
    "inputs_unchanged",
    "jacobians",
    "layouts",
    "memory",
    "opcheck",
    "precision",
    "shapes",
    "strides",
    "subsets",
    "sweep",
    "two_backwards",
    "vmap",
]
