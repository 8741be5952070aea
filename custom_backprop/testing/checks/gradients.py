"""The tensors that backward returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, same_bits, weights_for
from ..outcome import NotApplicable, first_sample
from .compare import not_isolated, require


@first_sample
def gradient_memory(case: Case) -> None:
    """``x.grad`` is a tensor of its own: after backward, a write into it changes no argument, no
    output, no incoming gradient and no other gradient. It has no history.

    Where the reference does not satisfy this either, nothing is asked: ``x.reshape(-1)`` gives a
    view of its incoming gradient. Without a reference only history, arguments and outputs count.

    Finds ``return dy, dy.view_as(dy)`` (clipping one of the two gradients then clips both), and a
    saved parameter that is returned as a gradient. Dtype, shape and strides are autograd's work: it
    converts and copies what does not fit.
    """
    not_isolated(case)
    found = _faults(case, case.call)
    if case.reference:
        wrong = found.keys() - _faults(case, case.call_reference).keys()
    else:
        wrong = {fault for fault, always in found.items() if always}
    require(not wrong, "; ".join(sorted(wrong)))


def _faults(case: Case, call: Callable[..., Any]) -> dict[str, bool]:
    """What is wrong with the gradients -> whether no operation of torch does that."""
    leaves = case.leaves
    results = [r for r in outputs(call(*leaves)) if r.requires_grad]
    if not results:
        raise NotApplicable("no output requires grad")
    dys = weights_for(results)
    found = {}
    raw = torch.autograd.grad(results, leaves, dys, retain_graph=True, allow_unused=True)
    for i, gradient in enumerate(raw):
        if gradient is not None and gradient.requires_grad:
            found[f"the gradient of input {i} has a history"] = True
    torch.autograd.backward(results, dys, inputs=leaves)
    gradients = {f"the gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    given = [*case.args, *case.kwargs.values()]
    theirs = {f"argument {i}": a for i, a in enumerate(given) if isinstance(a, Tensor)}
    theirs |= {f"input {i}": leaf for i, leaf in enumerate(leaves)}
    theirs |= {f"output {i}": result for i, result in enumerate(results)}
    incoming = {f"the gradient of output {i}": dy for i, dy in enumerate(dys)}
    for name, own in gradients.items():
        if own is None:
            continue
        others = {k: t for k, t in gradients.items() if k != name and t is not None}
        for other in _written_with(own, theirs | incoming | others):
            found[f"{name} is memory of {other}"] = other in theirs
    return found


def _written_with(written: Tensor, others: dict[str, Tensor]) -> Sequence[str]:
    """Those of ``others`` that change when ``written`` does."""
    before = {name: t.detach().clone() for name, t in others.items()}
    value = written.detach().clone()
    written.detach().fill_(float("nan"))
    changed = [name for name, t in others.items() if not same_bits(t, before[name])]
    written.detach().copy_(value)
    return changed
