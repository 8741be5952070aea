"""Accuracy below float64, beside the reference's own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..case import Case, gradients, outputs, weights_for
from ..outcome import NotApplicable, NotOffered, Wrong, feature
from ..sweep import HALVES, every_value, units_off, value_and_derivative, worst_by_binade
from .compare import equal, relative_error, require, with_reference, without_none


@feature
def autocast(case: Case) -> None:
    """Under autocast results have the reference's dtypes and are as near to float64's, plus one
    unit of rounding. Gradients have the dtypes of their inputs.

    Finds a Function without ``custom_fwd``, whose backward meets dtypes that forward did not.
    """
    with_reference(case)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(case.device.type, torch.bfloat16):
            try:
                outputs(case.to(dtype).call_reference(*case.to(dtype).leaves))
            except (RuntimeError, NotImplementedError) as error:
                _raises(type(error), case.to(dtype))
                continue
        _no_worse(case, dtype, _errors_under_autocast, f"of {dtype} inputs under autocast")


@feature
def precision(case: Case) -> dict[str, tuple[float, float]]:
    """In each low-precision dtype, the error against float64 is no larger than the reference's own
    plus one unit of rounding. An elementwise function gets every 16-bit number in [-10, 10].

    Finds statistics that are kept in half precision, and sums that lose digits.

    Returns:
        dtype name -> (our error, the reference's), the largest over outputs and gradients, relative
        to the largest true value.
    """
    with_reference(case)
    figures, refused = {}, {}
    for dtype in case.low_precision:
        name = str(dtype).removeprefix("torch.")
        given = case
        if case.elementwise and dtype in HALVES:
            x = every_value(dtype, case.device)
            given = case.at(x[x.abs() <= 10])
        try:
            errors = _no_worse(given, dtype, _errors, f"in {dtype}")
        except Wrong:
            raise
        except Exception as error:
            refused[name] = f"{name}: {type(error).__name__}: {error}"
            continue
        figures[name] = (
            max(ours for ours, _, _ in errors),
            max(theirs for _, theirs, _ in errors),
        )
    if refused:
        raise NotOffered("; ".join(refused.values()), figures)
    return figures


#: an error may exceed the reference's largest in the same binade by this many units in the last
#: place: both are rounded once, from results that differ by a few units of float32
HAIR = 0.05


@feature
def sweep(case: Case) -> None:
    """For an elementwise function of one tensor, at every 16-bit number: value and derivative are
    as near to float64's as the reference's in that dtype, and finite where they are.

    Errors are in units in the last place. Each is compared with the reference's largest error for
    inputs of the same sign and exponent: ours may be inaccurate only where the reference is.

    Finds overflows and lost tails.
    """
    with_reference(case)
    if not case.elementwise:
        raise NotApplicable("not declared to be elementwise in one tensor")
    for dtype in case.low_precision:
        if dtype not in HALVES:
            continue
        x = every_value(dtype, case.device)
        truth = value_and_derivative(case.call_reference, x.double())
        theirs = value_and_derivative(case.call_reference, x)
        ours = value_and_derivative(case.call, x)
        for what, our, their, true in zip(
            ("value", "derivative"), ours, theirs, truth, strict=True
        ):
            off, stock = units_off(our, true), units_off(their, true)
            # torch's own derivatives at NaN differ between its vectorised loops and their last
            # elements; where stock's derivative is NaN, ours may be a number
            judged = stock.isfinite() & ~((x.isnan() | true.isnan()) & (what == "derivative"))
            off, stock = (torch.where(judged, e, 0.0) for e in (off, stock))
            limit = worst_by_binade(x, stock)
            excess = off - limit
            worst = excess.argmax()
            require(
                bool(excess[worst] <= HAIR),
                f"the {what} in {dtype} at {x[worst].item()!r} is {our[worst].item()!r}, off by "
                f"{off[worst]:.3g} units, the reference's around there by at most "
                f"{limit[worst]:.3g}; so at {(excess > HAIR).sum()} of {len(x)} inputs",
            )


#: how many inputs near those of a case are drawn
DRAWS = 16

#: (our error, the reference's, by how much ours may exceed it) for each output and gradient
Errors = list[tuple[float, float, float]]


def _no_worse(
    case: Case, dtype: torch.dtype, errors_of: Callable[[Case], Errors], where: str
) -> Errors:
    """Requires that our error exceeds the reference's by no more than allowed. The rounding of a
    few numbers is random: if one draw fails, the means over :data:`DRAWS` draws decide."""
    errors = errors_of(case.to(dtype))
    if any(our > their + allowed for our, their, allowed in errors):
        draws = [errors_of(case.nudged(seed).to(dtype)) for seed in range(DRAWS)]
        errors = [
            (
                sum(our for our, _, _ in of_one) / DRAWS,
                sum(their for _, their, _ in of_one) / DRAWS,
                of_one[0][2],
            )
            for of_one in zip(*draws, strict=True)
        ]
    for our, their, allowed in errors:
        require(
            our <= their + allowed, f"error {where}: ours {our:.2e}, the reference's {their:.2e}"
        )
    return errors


def _errors(case: Case) -> Errors:
    exact = case.to(torch.float64)
    dys = weights_for(outputs(case.call_reference(*case.leaves)))
    truth = gradients(exact.call_reference, exact.leaves, [d.double() for d in dys])
    ours = gradients(case.call, case.leaves, dys)
    theirs = gradients(case.call_reference, case.leaves, dys)
    found = [row for parts in zip(ours, theirs, truth, strict=True) for row in without_none(*parts)]
    equal(
        [o.dtype for o, _, _ in found],
        [t.dtype for _, t, _ in found],
        "dtypes of results in low precision",
    )
    dtype = case.leaves[0].dtype if case.leaves else found[0][0].dtype
    allowed = torch.finfo(dtype).eps
    return [(relative_error(o, e), relative_error(t, e), allowed) for o, t, e in found]


def _errors_under_autocast(case: Case) -> Errors:
    exact, leaves, others = case.to(torch.float64), case.leaves, case.leaves
    with torch.autocast(case.device.type, torch.bfloat16):
        results, expected = outputs(case.call(*leaves)), outputs(case.call_reference(*others))
    equal([r.dtype for r in results], [e.dtype for e in expected], "output dtypes under autocast")
    dys = weights_for(expected)
    grads = torch.autograd.grad(results, leaves, dys, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, others, dys, allow_unused=True)
    for grad, leaf in zip(grads, leaves, strict=True):
        require(
            grad is None or grad.dtype == leaf.dtype,
            f"a gradient under autocast is {grad is not None and grad.dtype} of {leaf.dtype}",
        )
    truth, true_grads = gradients(exact.call_reference, exact.leaves, [d.double() for d in dys])
    coarsest = max(torch.finfo(r.dtype).eps for r in expected)
    found = []
    for ours, theirs, trues, least in (
        (results, expected, truth, 0.0),
        (grads, expected_grads, true_grads, coarsest),
    ):
        for our, their, true in without_none(ours, theirs, trues):
            allowed = max(torch.finfo(our.dtype).eps, least)
            found.append((relative_error(our, true), relative_error(their, true), allowed))
    return found


def _raises(error: type[Exception], case: Case) -> None:
    try:
        case.call(*case.leaves)
    except error:
        return
    raise Wrong(f"the reference raises {error.__name__}, ours does not")
