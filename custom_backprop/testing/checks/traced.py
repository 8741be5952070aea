"""Custom operators and compilers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..case import Case, gradients, outputs
from ..interpreter import is_interpreted
from ..outcome import NotApplicable, NotRun, costly, feature, first_sample
from .compare import same
from .determinism import seeded


@first_sample
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
@first_sample
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


@feature
@costly
def export(case: Case) -> None:
    """torch.export with dynamic shapes gives a program that computes the same, also for one more
    row.

    Finds operators without fake tensors, and shapes that are read as numbers and so become
    constants.
    """
    dynamic = tuple(
        {d: torch.export.Dim.AUTO for d, size in enumerate(t.shape) if size > 1}
        for t in _tensors(case)
    )

    class Call(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return case.function(*_with(case, given), **case.kwargs)

    program = torch.export.export(
        Call(), tuple(_tensors(case)), dynamic_shapes=(dynamic,), strict=False
    ).module()
    for given in _with_one_more_row(case):
        with seeded(case):
            expected = outputs(Call()(*map(torch.clone, given)))
        with seeded(case):
            same(
                outputs(program(*map(torch.clone, given))),
                expected,
                "outputs of the exported program",
            )


@feature
@costly
def dynamic_shapes(case: Case) -> None:
    """torch.compile(dynamic=True) gives eager's outputs and gradients, also for one more row.

    Finds a size that backward remembers from the first call.
    """
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for given in _with_one_more_row(case):
        args = _with(case, given)
        args = tuple(a.requires_grad_() if i in case.wanted else a for i, a in enumerate(args))
        found: list[Any] = []
        for function in (case.function, compiled):
            of_one = replace(case, function=function, args=args)
            with seeded(case):
                found += gradients(of_one.call, of_one.leaves)
        results, grads, compiled_results, compiled_grads = found
        same(compiled_results, results, "outputs compiled with dynamic shapes")
        same(compiled_grads, grads, "gradients compiled with dynamic shapes")


def _tensors(case: Case) -> list[Tensor]:
    return [a.detach() for a in case.args if isinstance(a, Tensor)]


def _with(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The positional arguments, with these tensors."""
    left = iter(tensors)
    return tuple(next(left) if isinstance(a, Tensor) else a for a in case.args)


def _with_one_more_row(case: Case) -> Iterator[list[Tensor]]:
    """The tensors, and again with their first row once more at their end, if the function takes
    that. Rows are as many as the first tensor has, and more than one."""
    tensors = _tensors(case)
    yield [t.clone() for t in tensors]
    rows = next((t.shape[0] for t in tensors if t.dim()), 0)
    if rows < 2:
        return
    longer = [torch.cat([t, t[:1]]) if t.dim() and len(t) == rows else t.clone() for t in tensors]
    try:
        case.function(*_with(case, [t.clone() for t in longer]), **case.kwargs)
    except Exception:
        return
    yield longer


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
