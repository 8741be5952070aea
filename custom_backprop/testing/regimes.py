"""What an op launches, in each of the regimes that its kernels are compiled for.

The op runs on meta tensors: its launchers launch nothing but are observed, and Triton compiles what
they would have launched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import selection
from ..backends.kernels import kernels
from ..backends.library import OPERATORS
from .case import outputs, weights_for
from .offline import TARGETS, Launch, Resources, compile_launches
from .spec import Make, OpSpec, Sample


class _Launching(TorchDispatchMode):
    """Inside, a primitive calls the launcher of its kernels, whatever the device of its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in OPERATORS:
            return func(*args, **kwargs or {})
        defaults = [
            a.default_value for a in func._schema.arguments[len(args) :]
        ]  # the dispatcher drops arguments that equal their defaults
        return OPERATORS[func].triton(*args, *defaults)

    def __enter__(self) -> Any:
        self._previous, selection._forced = selection._forced, "triton"
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        selection._forced = self._previous
        super().__exit__(*exception)


def launches(function: Callable[[], Any], target: str = "sm_90") -> list[Launch]:
    """The launches that ``function`` makes on meta tensors, for a GPU."""
    found: list[Launch] = []

    def observer(kernel: Any, programs: int, args: Any, constexprs: Any, options: Any) -> None:
        found.append(Launch(kernel, args, constexprs, options))

    launch, arch = kernels("launch"), TARGETS[target].arch
    capability = launch.meta_capability(arch if isinstance(arch, int) else 0)
    with capability, launch.observed(observer), _Launching():
        function()
    return found


class _Noting(TorchDispatchMode):
    """Notes the operators of torch that run a kernel of their own: they have a result with
    elements, that is neither a view nor left as it was allocated."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        results = result if isinstance(result, (tuple, list)) else (result,)
        if (
            any(isinstance(r, Tensor) and r.numel() for r in results)
            and not func.is_view
            and not re.match("aten.(new_)?(empty|detach)", str(func))
        ):
            self.found.append(str(func))
        return result


def launched(spec: OpSpec) -> tuple[list[str], list[str]]:
    """What a GPU runs for an op's large sample: our kernels and torch's operators, of forward with
    a gradient wanted, and of backward."""
    found: tuple[list[str], list[str]] = [], []
    sample = spec.large(Make("meta", torch.bfloat16), "large")
    given = [*sample.args, *sample.kwargs.values()]
    leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]

    def run(into: list[str], function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        def observer(kernel: Any, *_: Any) -> None:
            into.append(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}")

        with kernels("launch").observed(observer), _Noting(into), _Launching():
            return function(*args, **named)

    results = outputs(run(found[0], spec.function, *sample.args, **sample.kwargs))
    run(found[1], torch.autograd.grad, results, leaves, weights_for(results))
    return found


#: what an op is compiled for: the sizes are those of ``OpSpec.large``
REGIMES = [
    (torch.float64, "small"),
    *((d, size) for d in (torch.float32, torch.bfloat16) for size in ("small", "medium", "large")),
]


def both_ways(spec: OpSpec, sample: Sample) -> tuple[Tensor, ...]:
    """Runs the op without gradients, then forward and two backwards, one through a graph that is
    retained and one through a graph that is freed. Returns the outputs."""
    with torch.no_grad():
        spec.function(*sample.args, **sample.kwargs)
    results = outputs(spec.function(*sample.args, **sample.kwargs))
    dys = weights_for(results)
    torch.autograd.backward(results, dys, retain_graph=True)
    torch.autograd.backward(results, dys)
    return results


#: targets that kernels are compiled for in float64, which is there for gradcheck: of NVIDIA's one,
#: as all have the same registers
DOUBLE = ("sm_90", "gfx942")


def calls(spec: OpSpec, target: str = DOUBLE[0]) -> list[Callable[[], Any]]:
    """Calls of the op in each of :data:`REGIMES` and in the spec's own regimes, on meta tensors."""
    samples = [
        spec.large(Make("meta", dtype), size)
        for dtype, size in REGIMES
        if dtype != torch.float64 or target in DOUBLE
    ]
    for dtype in (torch.float64, torch.float32) if target in DOUBLE else (torch.float32,):
        samples += spec.regimes(Make("meta", dtype))  # half precision computes in float32
    return [partial(both_ways, spec, sample) for sample in samples]


#: rows that an op of rows is compiled for: one of each tile, those in a loop, and two whose length
#: leaves fewer numbers to an access
LENGTHS = (*(2**k for k in range(8, 19)), 1000, 50257)


def calls_by_length(spec: OpSpec) -> list[Callable[[], Any]]:
    """Calls of an op of rows on each of :data:`LENGTHS`, in bfloat16 on meta tensors."""
    make, call = Make("meta", torch.bfloat16), spec.by_length
    return [partial(both_ways, spec, call(make, 2**27 // n, n)) for n in LENGTHS] if call else []


def compile_op(spec: OpSpec, target: str) -> list[Resources]:
    """Compiles every kernel that an op launches in its :func:`calls`, for sm_90 also in its
    :func:`calls_by_length`."""
    by_length = calls_by_length(spec) if target == "sm_90" else []
    return compile_calls(calls(spec, target) + by_length, target)


def compile_calls(functions: Iterable[Callable[[], Any]], target: str) -> list[Resources]:
    """Compiles every kernel that these functions launch on meta tensors."""
    made = (launch for function in functions for launch in launches(function, target))
    return compile_launches(made, target)
