"""Transformations inside each other and under autograd, of every op, against the same of stock:
none is silently wrong."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from torch.autograd import forward_ad

from custom_backprop.testing.case import outputs, weights_for
from custom_backprop.testing.database import cases, database

SPECS = list(database().values())
pytestmark = pytest.mark.filterwarnings("ignore:.*('batchmean' divides|performance drop)")
every_op = pytest.mark.parametrize("spec", SPECS, ids=str)


def first_case(spec):
    """The op's first sample that has no empty tensor, and its tensors."""
    case = next(
        c for c in cases(spec, DEVICE) if c.leaves and all(leaf.numel() for leaf in c.leaves)
    )
    return case, tuple(leaf.detach() for leaf in case.leaves)


def weighted(function, leaves):
    """The outputs of a call of ``leaves`` as one number."""
    weights = weights_for(outputs(function(*leaves)))
    return lambda *args: sum(
        (r * w).sum() for r, w in zip(outputs(function(*args)), weights, strict=True)
    )


def close(ours, theirs):
    """Equal, where None is 0 (stock drops a gradient or a tangent that is 0)."""
    for our, their in zip(ours, theirs, strict=True):
        if our is not None or their is not None:
            pair = (
                torch.zeros_like(their) if our is None else our,
                torch.zeros_like(our) if their is None else their,
            )
            torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-10)


def in_rows(leaves):
    """Two calls' tensors, row by row, and as batches."""
    rows = [leaves, tuple(leaf * 0.9 for leaf in leaves)]
    return rows, [torch.stack(pair) for pair in zip(*rows, strict=True)]


@every_op
def test_a_backward_through_vmap(spec, backend):
    case, leaves = first_case(spec)
    rows, batch = in_rows(leaves)
    batch = [b.requires_grad_() for b in batch]
    results = torch.vmap(lambda *args: outputs(case.call(*args)))(*batch)
    weights = weights_for(results)
    grads = torch.autograd.grad(results, batch, weights, allow_unused=True)
    for i, row in enumerate(rows):
        row = [r.clone().requires_grad_() for r in row]
        stocks = outputs(case.call_reference(*row))
        close(
            [None if g is None else g[i] for g in grads],
            torch.autograd.grad(stocks, row, [w[i] for w in weights], allow_unused=True),
        )


@every_op
def test_forward_mode_over_vmap(spec, backend):
    case, leaves = first_case(spec)
    rows, batch = in_rows(leaves)
    tangents = weights_for(batch)
    values, derivatives = torch.func.jvp(
        torch.vmap(lambda *args: outputs(case.call(*args))), tuple(batch), tangents
    )
    for i, row in enumerate(rows):
        stocks = torch.func.jvp(
            lambda *args: outputs(case.call_reference(*args)),
            tuple(row),
            tuple(t[i] for t in tangents),
        )
        close([v[i] for v in values], stocks[0])
        close([d[i] for d in derivatives], stocks[1])


@every_op
def test_forward_mode_over_a_backward_that_makes_no_graph(spec, backend):
    """As the derivative of the gradient that makes one."""
    case, leaves = first_case(spec)
    directions = weights_for(leaves, seed=2)
    loss = weighted(case.call, leaves)
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(leaf.clone().requires_grad_(), t)
            for leaf, t in zip(leaves, directions, strict=True)
        ]
        grads = torch.autograd.grad(loss(*duals), duals, allow_unused=True)
        ours = [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(
        weighted(case.call_reference, leaves)(*leaves), leaves, create_graph=True, allow_unused=True
    )
    along = sum(
        (g * t).sum()
        for g, t in zip(grads, directions, strict=True)
        if g is not None and g.requires_grad
    )
    close(
        ours,
        torch.autograd.grad(along, leaves, allow_unused=True)
        if isinstance(along, torch.Tensor)
        else [None] * len(leaves),
    )


@every_op
def test_forward_mode_inside_forward_mode(spec, backend):
    case, leaves = first_case(spec)
    ours = torch.func.jacfwd(torch.func.jacfwd(weighted(case.call, leaves)))(*leaves)
    close(
        [ours],
        [torch.func.jacrev(torch.func.jacrev(weighted(case.call_reference, leaves)))(*leaves)],
    )


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap of grad"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.representative], ids=str)
def test_compiled(spec, transform):
    """Dynamo takes a Function's forward to pieces there, and finds the primitives."""
    case, leaves = first_case(spec)
    batch = [torch.stack([leaf, leaf * 0.9]) for leaf in leaves]

    def of(loss):
        if transform == "vmap of grad":
            return torch.vmap(torch.func.grad(loss))(*batch)
        return getattr(torch.func, transform)(loss)(*leaves)

    ours, theirs = (weighted(f, leaves) for f in (case.call, case.call_reference))
    torch._dynamo.reset()
    close([torch.compile(of, backend="aot_eager")(ours)], [of(theirs)])


@every_op
def test_a_gradient_depends_on_what_stocks_does(spec, backend):
    """Of an input, or of a weight: a second derivative that is 0 is found where stock finds it, and
    is not an error."""
    case, leaves = first_case(spec)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    for i in range(len(leaves)):
        seconds = []
        for function in (case.call, case.call_reference):
            (dx,) = torch.autograd.grad(
                weighted(function, leaves)(*leaves), leaves[i], create_graph=True
            )
            wanted = dx.requires_grad
            seconds.append(
                torch.autograd.grad(dx.sum(), leaves, allow_unused=True)
                if wanted
                else (None,) * len(leaves)
            )
        for ours, theirs in zip(*seconds, strict=True):
            assert ours is not None or theirs is None
            close([ours], [theirs])
