"""Derivatives against numerical ones, or in float32 against those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._tensor_str import printoptions
from torch.autograd import gradcheck as torch_gradcheck

from ..case import Case, gradients, outputs, weights_for
from ..outcome import NotApplicable, NotOffered, Wrong, feature, first_sample
from .compare import as_reference, outputs_of

#: rows of the Jacobian that a case in float32 compares
ROWS = 32
#: numbers of a Jacobian that an error prints
SHOWN = 64


def gradcheck(case: Case) -> None:
    """torch.autograd.gradcheck, undefined gradients included: the whole Jacobian against numerical
    differences.

    Finds what a reference with the same mistake would hide, and a backward that cannot take a
    gradient that is None. In float32 differences are too coarse: rows of the Jacobian are compared
    with the reference's.
    """
    if case.exact:
        _gradcheck(outputs_of(case), case.leaves, check_undefined_grad=True)
    else:
        as_reference(_needs_reference(case), _jacobian, "rows of the Jacobian")


@feature
@first_sample
def gradgradcheck(case: Case) -> None:
    """gradcheck of the gradients; an op without a second derivative must raise, not be silently
    wrong.

    Finds a backward whose result is cut from the graph, so that a gradient penalty trains on
    nothing. torch.autograd.gradgradcheck ignores every gradient that does not require grad, but
    that is what a cut graph looks like. Here such a gradient is a constant, and its derivative is
    compared with the numerical one, like any other.
    """
    leaves = case.leaves
    dys = tuple(d.requires_grad_() for d in weights_for(outputs(case.call(*leaves))))
    second = _second(case.call, len(leaves))
    results = second(*leaves, *dys)
    try:  # runs every node, even one that is cut off from the leaves
        torch.autograd.backward(results, weights_for(results))
    except RuntimeError as error:
        if case.double_backward:
            raise NotOffered(str(error)) from error
        return
    if not case.double_backward:
        raise Wrong("an op without a second derivative gave one")
    if case.exact:
        _gradcheck(second, (*case.leaves, *dys), check_undefined_grad=False)
    else:
        as_reference(_needs_reference(case), _second_gradients, "second derivatives")


@feature
@first_sample
def forward_mode(case: Case) -> None:
    """gradcheck of the jvp.

    Finds a wrong jvp, and one that forgets an input without a tangent.
    """
    if case.exact:
        _gradcheck(
            outputs_of(case),
            case.leaves,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
        )
    else:
        as_reference(_needs_reference(case), _tangents, "tangents of the outputs")


def _gradcheck(function: Callable[..., Any], inputs: Sequence[Tensor], **options: bool) -> None:
    """torch's, whose error holds two Jacobians: large ones are cut to their corners."""
    with printoptions(threshold=SHOWN):
        torch_gradcheck(function, tuple(inputs), **options)


def _needs_reference(case: Case) -> Case:
    if case.reference is None:
        raise NotApplicable("in float32 it needs a reference, and none was given")
    return case


def _second(function: Callable[..., Any], count: int) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients as a function of the leaves and of the gradients of the outputs. One that is
    cut from the graph is a constant."""

    def second(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, dys = inputs[:count], inputs[count:]
        grads = gradients(function, leaves, dys, create_graph=True)[1]
        return tuple(
            g if g.requires_grad else g + 0 * leaf
            for g, leaf in zip(grads, leaves, strict=True)
            if g is not None
        )

    return second


def _second_gradients(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Any:
    dys = tuple(d.requires_grad_() for d in weights_for(outputs(function(*leaves))))
    results = _second(function, len(leaves))(*leaves, *dys)
    inputs = (*leaves, *dys)
    return torch.autograd.grad(results, inputs, weights_for(results, 2), allow_unused=True)


def _jacobian(function: Callable[..., Any], leaves: Sequence[Tensor]) -> list[Any]:
    results = outputs(function(*leaves))
    rows: list[Any] = []
    for k, result in enumerate(results):
        if not result.requires_grad:
            continue
        for i in range(0, result.numel(), 1 + result.numel() // ROWS):
            dys = [torch.zeros_like(r, memory_format=torch.contiguous_format) for r in results]
            dys[k].view(-1)[i] = 1
            rows += torch.autograd.grad(results, leaves, dys, retain_graph=True, allow_unused=True)
    return rows


def _tangents(function: Callable[..., Any], leaves: Sequence[Tensor]) -> list[Any]:
    with fwad.dual_level():
        tangents = weights_for(leaves)
        duals = [fwad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)]
        return [fwad.unpack_dual(r).tangent for r in outputs(function(*duals))]
