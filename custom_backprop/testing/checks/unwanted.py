"""Work that nobody asked for."""

from __future__ import annotations

from typing import Any

import torch

from ..case import Case, outputs, weights_for
from ..outcome import NotApplicable, NotOffered, feature, first_sample
from .hooks import nodes_of


@feature
@first_sample
def unwanted(case: Case) -> None:
    """A Function returns no gradient for an input that does not require one.

    Finds a backward that does not ask ``ctx.needs_input_grad``: where a layer is frozen, it pays
    for the gradients of its parameters, and autograd throws them away. They are not wrong, so this
    is "not offered".
    """
    if len(case.leaves) < 2:
        raise NotApplicable("it has one differentiated input")
    found: set[int] = set()
    seen = False
    for chosen in range(len(case.leaves)):
        leaves = [x.detach().requires_grad_(i == chosen) for i, x in enumerate(case.leaves)]
        results = [r for r in outputs(case.call(*leaves)) if r.requires_grad]
        for node in nodes_of(results):
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                seen = True
                node.register_hook(lambda grads, _, node=node: found.update(_made(node, grads)))
        if results:
            torch.autograd.grad(results, leaves[chosen], weights_for(results), allow_unused=True)
    if not seen:
        raise NotApplicable("no Function of Python is called")
    if found:
        which = ", ".join(map(str, sorted(found)))
        raise NotOffered(f"gradients that nobody wants are computed, of the arguments {which}")


def _made(node: Any, grads: tuple[Any, ...]) -> set[int]:
    """Which gradients a node returned that lead nowhere."""
    wanted = [further is not None for further, _ in node.next_functions]
    return {
        i
        for i, (grad, want) in enumerate(zip(grads, wanted, strict=False))
        if grad is not None and not want
    }
