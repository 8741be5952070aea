"""The same call twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, same_bits, weights_for
from ..outcome import NotApplicable, first_sample
from .compare import require, same

#: how often a call is repeated
RUNS = 3


@first_sample
def determinism(case: Case) -> None:
    """Repeated with the same seed, forward and backward give the same bits. They give the same
    values if the memory that ``torch.empty`` returns is full of NaN.

    Where the bits of the reference differ from run to run, those of ours may.

    Finds atomics, whose sums differ from run to run, races between programs, and elements that no
    program writes, or that are read before: fresh memory is often zero, and later is not.
    """
    first, *others = (_run(case, case.call) for _ in range(RUNS))
    if not all(_same_bits(first, other) for other in others):
        if case.reference:
            first, *others = (_run(case, case.call_reference) for _ in range(RUNS))
            if not all(_same_bits(first, other) for other in others):
                raise NotApplicable("the reference's bits differ from run to run, too")
        require(False, "a second run with the same seed gave different bits")
    with _empty_is_nan():
        same(_run(case, case.call), first, "results where torch.empty is full of NaN")


def _run(case: Case, call: Callable[..., Any]) -> list[Tensor | None]:
    """Outputs and gradients, from the same state of the random generators."""
    with seeded(case):
        leaves = case.leaves
        results = outputs(call(*leaves))
        attached = [r for r in results if r.requires_grad]
        grads = (
            torch.autograd.grad(attached, leaves, weights_for(attached), allow_unused=True)
            if attached
            else ()
        )
    return [*(r.detach() for r in results), *grads]


def _same_bits(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else same_bits(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def seeded(case: Case) -> Iterator[None]:
    """Random numbers start again, and the generators are left as they were."""
    devices = [case.device] if case.device.type == "cuda" else []
    given = [g for g in (*case.args, *case.kwargs.values()) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in given]
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for generator, state in zip(given, states, strict=True):
            generator.set_state(state)


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """``torch.empty`` fills its memory with NaN, and integers with their largest value."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
