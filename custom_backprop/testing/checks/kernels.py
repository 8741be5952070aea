"""What Triton kernels do to memory, and what they take of a GPU: seen in the interpreter, on a
machine that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, weights_for
from ..outcome import NotApplicable, NotRun, Wrong, of_kernels
from .compare import transposed


@of_kernels
def memory(case: Case) -> str:
    """Every Triton kernel that forward and backward launch accesses elements of its tensors alone,
    and its programs do not depend on their order. Runs in the interpreter, for gradients that come
    contiguous, transposed, and with stride 0 as from ``y.sum().backward()``.

    Finds a tail without a mask, a row of a transposed gradient read as if it were contiguous, two
    programs that write the same element, one that reads what another writes, an update in place
    under ``@triton.autotune``, and results that depend on memory which nobody wrote.

    Returns:
        what need not be wrong, such as atomic operations.
    """
    from ..audit import audit
    from ..interpreter import interpreted

    _requires_cpu(case)
    with interpreted(), audit(lenient=True) as seen:
        _both_ways(case)
        if not seen.launches:
            raise NotApplicable("no Triton kernel was launched")
        for layout in (transposed, lambda dy: dy.new_ones(()).expand_as(dy)):
            # a layout that it refuses is for the check `layouts`
            _both_ways(case, layout, refuses=True)
        if seen.faults:
            raise Wrong("; ".join(dict.fromkeys(seen.faults)))
        _require_written(case)
    notes = [f"{launch.kernel}: {note}" for launch in seen.launches for note in launch.notes]
    return "; ".join(dict.fromkeys(notes))


@of_kernels
def compiles(case: Case) -> str:
    """Every Triton kernel that forward and backward launch compiles for sm_80, sm_90, sm_100 and
    gfx942, with the arguments of its launch. Needs no GPU.

    Finds what the interpreter lets pass: types that do not match, a shape that is not a power of
    two, code for one vendor alone.

    Returns:
        registers, spilled bytes, and how many of the loads and stores are 16 bytes wide, of each
        kernel on sm_90; and where else it spills.
    """
    from ..launches import record_launches
    from ..offline import TARGETS

    _requires_cpu(case)
    from triton.runtime.jit import JITFunction

    with record_launches() as launches:
        _both_ways(case)
    if not launches:
        raise NotApplicable("no Triton kernel was launched")
    if not all(isinstance(launch.kernel, JITFunction) for launch in launches):
        raise NotRun(
            "the kernels were decorated with TRITON_INTERPRET=1 and cannot be compiled: unset it, "
            "custom_backprop.testing.interpreted() does without"
        )
    refused, said = {}, []
    for target in TARGETS:
        try:
            said += _resources(launches, target)
        except Exception as error:
            refused[target] = f"{type(error).__name__}: {str(error).splitlines()[-1]}"
    if any(target.startswith("sm_") for target in refused):
        raise Wrong("; ".join(f"{target}: {reason}" for target, reason in refused.items()))
    said += [f"not for {target}: {reason}" for target, reason in refused.items()]
    return "; ".join(said)


def _resources(launches: list[Any], target: str) -> list[str]:
    from ..offline import compile_launches

    return [
        f"{r.kernel} on {target}: {r.registers} registers, {r.spilled} bytes spilled, "
        f"16 bytes wide {r.wide_loads} of {r.loads} loads and {r.wide_stores} of {r.stores} stores"
        for r in compile_launches(launches, target)
        if target == "sm_90" or r.spilled
    ]


def _requires_cpu(case: Case) -> None:
    if find_spec("triton") is None:
        raise NotApplicable("the package triton is not installed")
    if case.device.type != "cpu":
        raise NotRun("the interpreter's kernels are seen on CPU tensors alone")


def _both_ways(
    case: Case,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    refuses: bool = False,
) -> list[Tensor]:
    """Outputs and gradients for random gradients in some layout."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    attached = [r for r in results if r.requires_grad]
    if not attached:
        return list(results)
    dys = [layout(dy) for dy in weights_for(attached)]
    try:
        grads = torch.autograd.grad(attached, leaves, dys, allow_unused=True)
    except Exception:
        if not refuses:
            raise
        return []
    return [t.detach() for t in (*results, *grads) if t is not None]


def _require_written(case: Case) -> None:
    """Results do not depend on what ``torch.empty`` gives."""
    torch.manual_seed(0)
    found = _both_ways(case)
    torch.manual_seed(0)
    with _new_memory_is_nan():
        filled = _both_ways(case)
    for i, (t, other) in enumerate(zip(found, filled, strict=True)):
        if bad := int((other.isnan() & ~t.isnan()).sum()):
            raise Wrong(
                f"{bad} of {t.numel()} elements of result {i} depend on memory that nobody wrote"
            )


@contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
