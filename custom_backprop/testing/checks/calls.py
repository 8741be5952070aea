"""Ways to call the function: by keyword, and from several threads."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, weights_for
from ..outcome import NotApplicable, NotRun, Wrong, costly, first_sample
from .compare import same
from .determinism import seeded

#: threads that call at once, and calls of each
THREADS, CALLS = 4, 3


@first_sample
def keywords(case: Case) -> None:
    """Every argument by its name, and those that are not given at their defaults, give the same
    outputs and gradients.

    Finds a wrapper whose signature names arguments that it does not take, arguments that are
    handed on in another order, and defaults that are not what the signature says.
    """
    try:
        signature = inspect.signature(case.function)
    except (TypeError, ValueError):
        raise NotApplicable("it has no signature that can be read") from None
    kinds = {name: p.kind for name, p in signature.parameters.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Wrong(f"its signature {signature} does not take this call: {error}") from None
        bound.apply_defaults()
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if kinds[name] is inspect.Parameter.VAR_KEYWORD:
                named |= value
            else:
                named[name] = value
        return case.function(**named)

    nameless = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if nameless & set(kinds.values()):
        raise NotApplicable(f"its signature {signature} takes arguments without a name")
    found = [_run(c) for c in (case, replace(case, function=call))]
    same(found[1], found[0], "results of a call by keyword")


@costly
def threads(case: Case) -> None:
    """The same call from several threads at once, forward and backward, gives what it gives alone.

    Finds scratch memory, counters and options that calls share.
    """
    expected = _run(case)  # imports what it launches
    with _interpreted_launches() as launches:
        _run(case)
    if launches:
        raise NotRun("Triton's interpreter is for one thread")
    if _has_random_numbers(case):
        raise NotApplicable("it draws random numbers, and threads share their generator")
    with ThreadPoolExecutor(THREADS) as pool:
        runs = [pool.submit(_run, case, seed=False) for _ in range(THREADS * CALLS)]
    for run in runs:
        same(run.result(), expected, "results of one of several threads")


@contextmanager
def _interpreted_launches() -> Iterator[list[Any]]:
    """The kernels that Triton's interpreter runs."""
    found: list[Any] = []
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield found
        return
    call = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = noted
    try:
        yield found
    finally:
        interpreter.GridExecutor.__call__ = call


def _has_random_numbers(case: Case) -> bool:
    """Whether a call advances the generator."""
    before = torch.get_rng_state()
    _run(case, seed=False)
    return not torch.equal(before, torch.get_rng_state())


def _run(case: Case, seed: bool = True) -> list[Tensor | None]:
    """Outputs and gradients."""
    if seed:
        with seeded(case):
            return _run(case, seed=False)
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    attached = [r for r in results if r.requires_grad]
    weights = weights_for(attached)
    grads = torch.autograd.grad(attached, leaves, weights, allow_unused=True) if attached else ()
    return [*(r.detach() for r in results), *grads]
