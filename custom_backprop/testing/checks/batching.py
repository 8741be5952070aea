"""Batched gradients, and the transforms of torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, weights_for
from ..outcome import NotApplicable, feature
from .compare import outputs_of, same, stack


@feature
def batched(case: Case) -> None:
    """is_grads_batched=True, once and twice, equals a loop.

    Finds a backward that reads values in Python, or cannot take a batched gradient.
    """
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = [weights_for(results, seed) for seed in (1, 2, 3)]
    stacked = tuple(torch.stack(d) for d in zip(*dys, strict=True))
    loop = [
        torch.autograd.grad(results, leaves, d, retain_graph=True, allow_unused=True) for d in dys
    ]
    together = torch.autograd.grad(
        results, leaves, stacked, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    same(together, stack(loop), "batched gradients")
    if not case.double_backward:
        return
    grads = torch.autograd.grad(results, leaves, dys[0], create_graph=True, allow_unused=True)
    second = tuple(g for g in grads if g is not None and g.requires_grad)
    if not second:
        return
    weights = [weights_for(second, seed) for seed in (4, 5)]
    loop = [
        torch.autograd.grad(second, leaves, w, retain_graph=True, allow_unused=True)
        for w in weights
    ]
    stacked = tuple(torch.stack(w) for w in zip(*weights, strict=True))
    together = torch.autograd.grad(
        second, leaves, stacked, is_grads_batched=True, allow_unused=True
    )
    same(together, stack(loop), "batched second gradients")


@feature
def vmap(case: Case) -> None:
    """vmap over each leaf and over all, and per-sample gradients, against loops.

    Finds a vmap rule that puts the batch in the wrong place, and a backward that mixes samples.
    """
    leaves = _values(case)
    which = tuple(range(len(leaves)))
    loss = _loss(case.call, leaves)
    batch = tuple(torch.stack([leaf, leaf * 0.9, leaf * 0.8]) for leaf in leaves)
    singles = [(i,) for i in which] if len(which) > 1 else []
    for mapped, dim in [*((m, 0) for m in singles), (which, 0), (which, -1)]:
        in_dims = tuple(dim if i in mapped else None for i in which)
        args = tuple(
            b.movedim(0, dim) if i in mapped else leaf
            for i, (b, leaf) in enumerate(zip(batch, leaves, strict=True))
        )
        rows = [
            tuple(
                b[k] if i in mapped else leaf
                for i, (b, leaf) in enumerate(zip(batch, leaves, strict=True))
            )
            for k in range(3)
        ]
        same(
            torch.vmap(outputs_of(case), in_dims)(*args),
            stack([outputs(case.call(*row)) for row in rows]),
            f"vmap over dimension {dim} of {mapped}",
        )
        same(
            torch.vmap(torch.func.grad(loss, which), in_dims)(*args),
            stack([torch.func.grad(loss, which)(*row) for row in rows]),
            f"per-sample gradients over {mapped}",
        )


@feature
def jacobians(case: Case) -> None:
    """jacrev equals jacfwd.

    Finds a jvp and a backward that do not belong together.
    """
    leaves = _values(case)
    which = tuple(range(len(leaves)))
    reverse = torch.func.jacrev(outputs_of(case), which)(*leaves)
    forward = torch.func.jacfwd(outputs_of(case), which)(*leaves)
    for r, f in zip(reverse, forward, strict=True):
        same(r, f, "jacrev and jacfwd")


@feature
def hessian(case: Case) -> None:
    """torch.func.hessian is symmetric, and the reference's.

    Finds a jvp of backward that drops a term.
    """
    if not case.double_backward:
        raise NotApplicable("stated to have no second derivative")
    leaves = _values(case)
    which = tuple(range(len(leaves)))
    found = torch.func.hessian(_loss(case.call, leaves), which)(*leaves)
    for i, j in itertools.product(which, which):
        same(
            (found[i][j],),
            (found[j][i].permute(_swap(leaves[i], leaves[j])),),
            "hessian and its transpose",
        )
    if case.reference and case.exact:
        expected = torch.func.hessian(_loss(case.call_reference, leaves), which)(*leaves)
        for i, j in itertools.product(which, which):
            same((found[i][j],), (expected[i][j],), "hessian")


def _values(case: Case) -> tuple[Tensor, ...]:
    """The leaves without history."""
    leaves = tuple(leaf.detach() for leaf in case.leaves)
    if not leaves:
        raise NotApplicable("nothing is differentiated")
    if not all(leaf.numel() for leaf in leaves):
        raise NotApplicable("torch.func's jacobians do not take empty tensors")
    return leaves


def _loss(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A weighted sum of the outputs."""
    weights = weights_for(outputs(function(*leaves)))

    def weighted(*args: Tensor) -> Tensor:
        parts = [(r * w).sum() for r, w in zip(outputs(function(*args)), weights, strict=True)]
        return torch.stack(parts).sum()

    return weighted


def _swap(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The permutation that turns a block of the hessian, of shape (b.shape, a.shape), into
    (a.shape, b.shape)."""
    return (*range(b.dim(), b.dim() + a.dim()), *range(b.dim()))
