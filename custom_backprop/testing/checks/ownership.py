"""Whose memory is written and kept."""

from __future__ import annotations

import gc
import itertools
import weakref

import torch

from ..case import Case, gradients, outputs, same_bits, weights_for
from ..outcome import Wrong
from .compare import require, same


def inputs_unchanged(case: Case) -> None:
    """No input and no grad_output is overwritten: same bits, same version.

    Finds a kernel that saves memory by writing into what belongs to the caller.
    """
    if found := case.overwritten():
        raise Wrong(found)


def two_backwards(case: Case) -> None:
    """A second backward through a retained graph gives the same bits, even if the first gradients
    were overwritten.

    Finds a backward that overwrites what forward saved, and atomics, whose sums differ from run to
    run.
    """
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    dys = weights_for(results)
    for weights in (dys, tuple(map(torch.ones_like, dys))):
        first = torch.autograd.grad(
            results, leaves, [w.clone() for w in weights], retain_graph=True, allow_unused=True
        )
        expected = [None if g is None else g.clone() for g in first]
        for g in first:
            if g is not None and not any(
                s == 0 for s in g.stride()
            ):  # an expanded tensor cannot be overwritten
                g.mul_(3)
        second = torch.autograd.grad(
            results, leaves, [w.clone() for w in weights], retain_graph=True, allow_unused=True
        )
        for a, b in zip(expected, second, strict=True):
            require(
                (a is None) == (b is None) and (a is None or same_bits(a, b)),
                "the second backward gave different bits",
            )


def freed(case: Case) -> None:
    """Outputs are freed with their last reference. A cycle through the context would let them live
    until the garbage collector runs.

    Finds ``ctx.y = y``: use ``save_for_backward``.
    """
    leaves = case.leaves
    collecting = gc.isenabled()
    gc.disable()
    try:
        results = outputs(case.call(*leaves))
        watched = [weakref.ref(r) for r in results]
        torch.autograd.grad(results, leaves, weights_for(results), allow_unused=True)
        del results
        require(
            not any(w() is not None for w in watched),
            "an output outlives its last reference: a reference cycle",
        )
    finally:
        if collecting:
            gc.enable()


def subsets(case: Case) -> None:
    """For every subset of the inputs that require grad, their gradients are right and there are no
    others.

    Finds a backward that fails, or computes something else, where a weight is frozen.
    """
    leaves = case.leaves
    dys = weights_for(outputs(case.call(*leaves)))
    full = gradients(case.call, leaves, dys)[1]
    for size in range(len(leaves)):
        for chosen in itertools.combinations(range(len(leaves)), size):
            some = tuple(leaf.detach().requires_grad_(i in chosen) for i, leaf in enumerate(leaves))
            results = outputs(case.call(*some))
            attached = [r for r in results if r.requires_grad]
            require(bool(chosen or not attached), "an output requires grad, and no input does")
            if attached:
                weights = [d for r, d in zip(results, dys, strict=True) if r.requires_grad]
                torch.autograd.backward(attached, weights)
            for i, (leaf, expected) in enumerate(zip(some, full, strict=True)):
                require(
                    (leaf.grad is not None) == (i in chosen and expected is not None),
                    f"inputs {chosen}: gradient of input {i}",
                )
                if i in chosen and expected is not None:
                    same(
                        (leaf.grad,),
                        (expected,),
                        f"gradient of input {i} with only {chosen} wanted",
                    )
