"""Custom operators and compilers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..case import Case, gradients, outputs
from ..interpreter import is_interpreted
from ..outcome import NotApplicable, NotRun, feature, traced
from .compare import same


@traced
def opcheck(case: Case) -> None:
    """torch.library.opcheck on every custom operator that forward and backward call.

    Finds a schema that hides a write, and fake tensors of other shapes, dtypes or strides.
    """
    with Recorder() as recorder:
        gradients(case.call, case.leaves)
    if not recorder.calls:
        raise NotApplicable("no custom operator is called")
    for operator, args, kwargs in recorder.calls.values():
        torch.library.opcheck(operator, args, kwargs)


@feature
@traced
def compile(case: Case) -> None:
    """torch.compile(fullgraph=True) gives eager's outputs and gradients, and also its outputs if no
    gradient is needed.

    Finds a Function that breaks the graph, and a gradient that a compiler loses.
    """
    if is_interpreted():
        raise NotRun("torch.compile does not see through the interpreter of Triton's kernels")
    leaves = case.leaves
    expected, expected_grads = gradients(case.call, leaves)
    compilable = case.inductor and cpp_compiler() is not None
    for backend in ("aot_eager", "inductor") if compilable else ("aot_eager",):
        torch._dynamo.reset()
        function = torch.compile(case.function, fullgraph=True, backend=backend)
        compiled = replace(case, function=function).call
        results, grads = gradients(compiled, leaves)
        same(results, expected, f"outputs compiled by {backend}")
        same(grads, expected_grads, f"gradients compiled by {backend}")
        same(
            outputs(compiled(*(leaf.detach() for leaf in leaves))),
            expected,
            f"outputs compiled by {backend} without gradients",
        )
    if case.inductor and not compilable:
        raise NotRun("Inductor, which needs a C++ compiler (set CXX)")


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use on a CPU, or None if none works."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


class Recorder(TorchDispatchMode):
    """Records one call of each operator that does not belong to PyTorch."""

    STOCK = frozenset(
        {"aten", "prim", "prims", "higher_order", "inductor", "profiler", "_c10d_functional"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in self.STOCK:
            detached = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.setdefault(func, (func, detached, kwargs))
        return func(*args, **kwargs)
