"""Tensors that are changed in place between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..case import Case, outputs, weights_for
from ..outcome import NotOffered, feature, first_sample
from .compare import not_isolated, same
from .determinism import seeded


@feature
@first_sample
def in_place(case: Case) -> None:
    """An output may be changed in place after the call, as in ``linear(x).relu_()``, where the
    reference's may. If an argument is changed, backward raises, or gives the gradients of what the
    argument was.

    Finds outputs that are views made inside a Function, and tensors that are not in
    ``save_for_backward``: nobody notices that they were changed, and the gradients are wrong.
    """
    not_isolated(case)
    refused = [
        f"output {k}: {error}"
        for k in range(len(outputs(case.call(*case.leaves))))
        if (error := _output_refuses(case, case.call, k))
        and not (case.reference and _output_refuses(case, case.call_reference, k))
    ]
    for name in _tensors(case):
        _after_a_change(case, name)
    if refused:
        raise NotOffered("; ".join(refused))


def _output_refuses(case: Case, call: Callable[..., Any], k: int) -> str:
    """What is raised if output ``k`` is doubled in place before backward; empty if nothing."""
    leaves = case.leaves
    with seeded(case):
        results = list(outputs(call(*(leaf.clone() for leaf in leaves))))
    if not results[k].requires_grad or any(
        _overlap(results[k], r) for i, r in enumerate(results) if i != k
    ):
        return ""
    attached = [i for i, r in enumerate(results) if r.requires_grad]
    dys = [weights_for(results)[i] for i in attached]
    with seeded(case):
        others = list(outputs(call(*leaves)))
    others[k] = 2 * others[k]
    expected = torch.autograd.grad([others[i] for i in attached], leaves, dys, allow_unused=True)
    try:
        results[k].mul_(2)
        grads = torch.autograd.grad([results[i] for i in attached], leaves, dys, allow_unused=True)
    except RuntimeError as error:
        return str(error)
    same((results[k],), (others[k],), f"output {k}, doubled in place")
    same(grads, expected, f"gradients after output {k} was doubled in place")
    return ""


def _tensors(case: Case) -> list[int | str]:
    """Positions and names of the arguments that are tensors."""
    given = _named(case.args, case.kwargs)
    return [name for name, a in given.items() if isinstance(a, Tensor) and a.numel()]


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def _after_a_change(case: Case, name: int | str) -> None:
    """Requires right gradients, or an error, if an argument is changed before backward."""
    kwargs = tree_map_only(Tensor, torch.clone, case.kwargs)
    args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in case.args)
    leaves = case.leaves
    copies = [leaf.clone() for leaf in leaves]
    fresh = replace(case, args=_like(args, case), kwargs=kwargs)
    given = _named(fresh._fill(copies), kwargs)
    results = [r for r in outputs(fresh.call(*copies)) if r.requires_grad]
    changed = given[name]
    if not results or any(_overlap(r, changed) for r in results):
        return
    dys = weights_for(results)
    expected = torch.autograd.grad(results, leaves, dys, retain_graph=True, allow_unused=True)
    changed.mul_(2) if changed.is_floating_point() else changed.zero_()
    try:
        grads = torch.autograd.grad(results, leaves, dys, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return
    same(grads, expected, f"gradients after argument {name!r} was changed in place")


def _like(args: tuple[Any, ...], case: Case) -> tuple[Any, ...]:
    """The arguments, differentiated where those of the case are."""
    return tuple(a.requires_grad_() if i in case.wanted else a for i, a in enumerate(args))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
