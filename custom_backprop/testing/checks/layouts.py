"""Strides of what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, gradients, outputs, weights_for
from ..outcome import feature
from .compare import require, same, sliced, transposed


def layouts(case: Case) -> None:
    """Every layout of grad_output: contiguous, transposed, sliced, stride 0, None.

    Finds a backward that reads outside of ``y.sum()``'s gradient, which has stride 0, or takes a
    transposed one for a contiguous one. gradcheck feeds contiguous ones alone.
    """
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = weights_for(results)

    def grads(dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of the same graph; of a new one, if backward may overwrite what forward saved."""
        of = outputs(case.call(*leaves)) if case.isolated else results
        return torch.autograd.grad(of, leaves, dys, retain_graph=True, allow_unused=True)

    expected = grads(dys)
    for name, layout in (("transposed", transposed), ("sliced", sliced)):
        same(grads([layout(d) for d in dys]), expected, f"gradients for a {name} grad_output")
    uniform = [d.new_tensor(0.7).expand_as(d) for d in dys]
    expected = grads([u.contiguous() for u in uniform])
    same(grads(uniform), expected, "gradients for a stride-0 grad_output")
    undefined: Any = [torch._C._functions.UndefinedGrad()(r) for r in results]
    for grad in torch.autograd.grad(undefined, leaves, dys, allow_unused=True):
        require(
            grad is None or not grad.count_nonzero(),
            "a gradient came from an undefined grad_output",
        )


@feature
def input_layouts(case: Case) -> None:
    """Transposed, sliced and expanded inputs give the same as contiguous ones.

    Finds a kernel that ignores strides.
    """
    leaves = case.leaves
    results, grads = gradients(case.call, leaves)
    for name, layout in (("transposed", transposed), ("sliced", sliced)):
        strided = tuple(layout(leaf.detach()).requires_grad_() for leaf in leaves)
        got, got_grads = gradients(case.call, strided)
        same(got, results, f"outputs for {name} inputs")
        same(got_grads, grads, f"gradients for {name} inputs")
    repeated = [
        leaf.detach()[:1].expand_as(leaf) if leaf.dim() and leaf.numel() else leaf.detach()
        for leaf in leaves
    ]
    (got, got_grads), (results, grads) = (
        gradients(case.call, [f(r).requires_grad_() for r in repeated])
        for f in (Tensor.detach, torch.clone)
    )
    same(got, results, "outputs for expanded inputs")
    same(got_grads, grads, "gradients for expanded inputs")
