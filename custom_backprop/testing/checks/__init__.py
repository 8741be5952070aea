"""The checks of :func:`validate`. Each is a function of one :class:`Case`; its docstring says which
bug it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..case import Case
from .accuracy import accuracy
from .batch_invariance import batch_invariance
from .batching import batched, hessian, jacobians, vmap
from .calls import keywords, threads
from .derivatives import forward_mode, gradcheck, gradgradcheck
from .determinism import determinism
from .gradients import gradient_memory
from .hooks import hooks, saved_tensors
from .in_place import in_place
from .kernels import compiles, memory
from .layouts import input_layouts, layouts
from .loss_scale import loss_scale
from .memory_use import memory_use
from .mutations import mutations
from .non_finite import non_finite
from .ownership import freed, inputs_unchanged, subsets, two_backwards
from .precision import autocast, precision, sweep
from .search import shapes, strides
from .traced import compile, dynamic_shapes, export, opcheck
from .unwanted import unwanted
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
        dynamic_shapes,
        export,
        layouts,
        input_layouts,
        strides,
        shapes,
        inputs_unchanged,
        two_backwards,
        freed,
        gradient_memory,
        determinism,
        batch_invariance,
        in_place,
        non_finite,
        hooks,
        saved_tensors,
        keywords,
        threads,
        unwanted,
        memory_use,
        mutations,
        subsets,
        memory,
        compiles,
        autocast,
        precision,
        sweep,
        loss_scale,
        accuracy,
    )
}

__all__ = [
    "CHECKS",
    "accuracy",
    "autocast",
    "batch_invariance",
    "batched",
    "compile",
    "compiles",
    "determinism",
    "dynamic_shapes",
    "export",
    "float64",
    "forward",
    "forward_mode",
    "freed",
    "gradcheck",
    "gradgradcheck",
    "gradient",
    "gradient_memory",
    "hessian",
    "hooks",
    "in_place",
    "input_layouts",
    "inputs_unchanged",
    "jacobians",
    "keywords",
    "layouts",
    "loss_scale",
    "memory",
    "memory_use",
    "mutations",
    "non_finite",
    "opcheck",
    "precision",
    "saved_tensors",
    "shapes",
    "strides",
    "subsets",
    "sweep",
    "threads",
    "two_backwards",
    "unwanted",
    "vmap",
]
