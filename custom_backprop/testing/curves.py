"""The error of a call over the range of its inputs, in units in the last place, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .case import Case, gradients, outputs, weights_for
from .sweep import HALVES, every_value, units_off, value_and_derivative, worst_by_binade

#: the powers of two by which the inputs of a call are multiplied
POWERS = range(-12, 13, 2)


@dataclass(frozen=True)
class Curve:
    """The largest error of one result, at several places.

    Attributes:
        title: which result, in which dtype.
        axis: what ``x`` is.
        x: the places, in order.
        ours, theirs: the largest error there; None where a result is infinite or NaN, and the truth
            is a number. ``theirs``, the reference's, is empty without one.
    """

    title: str
    axis: str
    x: tuple[float, ...]
    ours: tuple[float | None, ...]
    theirs: tuple[float | None, ...] = ()

    def worse(self, other: Curve) -> Curve:
        """The larger errors of two."""
        if self.x != other.x or len(self.theirs) != len(other.theirs):
            return self
        return replace(
            self, ours=_worse(self.ours, other.ours), theirs=_worse(self.theirs, other.theirs)
        )


def _worse(some: Sequence[float | None], others: Sequence[float | None]) -> tuple[Any, ...]:
    return tuple(
        None if a is None or b is None else max(a, b) for a, b in zip(some, others, strict=True)
    )


def curves(case: Case) -> list[Curve]:
    """The curves of a case, in each of its dtypes in which it runs.

    An elementwise function is evaluated at every 16-bit number; each point is the largest error
    between two powers of two. Of another one, the first differentiated argument is multiplied by
    powers of two, and an error is in units in the last place of the largest true value.
    """
    found: list[Curve] = []
    for dtype in case.low_precision:
        try:
            found += _elementwise(case, dtype) if case.elementwise else _scaled(case, dtype)
        except Exception:  # this dtype is not offered, as the check ``precision`` says
            continue
    return found


def _elementwise(case: Case, dtype: torch.dtype) -> Iterator[Curve]:
    numbers = every_value(dtype if dtype in HALVES else torch.bfloat16, case.device)
    numbers = numbers[numbers.isfinite()]
    order = numbers.double().argsort()
    numbers = numbers[order]
    x = numbers.to(dtype)
    exact = case.call_reference if case.reference else case.call
    truth = value_and_derivative(exact, x.double())
    ours = value_and_derivative(case.call, x)
    theirs = value_and_derivative(case.call_reference, x) if case.reference else (None, None)
    binade = torch.frexp(numbers.float()).exponent
    starts = [0, *(1 + (binade.diff() != 0).nonzero().flatten()).tolist()]
    for what, true, our, their in zip(("value", "derivative"), truth, ours, theirs, strict=True):
        yield Curve(
            f"{what} in {_name(dtype)}",
            "x",
            tuple(numbers[starts].tolist()),
            _largest(numbers, our, true, starts),
            () if their is None else _largest(numbers, their, true, starts),
        )


def _largest(
    numbers: Tensor, value: Tensor, truth: Tensor, starts: list[int]
) -> tuple[float | None, ...]:
    worst = worst_by_binade(numbers, units_off(value, truth))
    return tuple(e if math.isfinite(e) else None for e in worst[starts].tolist())


def _scaled(case: Case, dtype: torch.dtype) -> list[Curve]:
    columns: dict[str, list[tuple[float | None, float | None]]] = {}
    for power in POWERS:
        for name, ours, theirs in _errors(_times(case, 2.0**power).to(dtype)):
            columns.setdefault(name, []).append((ours, theirs))
    x = tuple(2.0**power for power in POWERS)
    return [
        Curve(
            f"{name} in {_name(dtype)}",
            f"factor on argument {case.wanted[0]}",
            x,
            tuple(ours for ours, _ in points),
            tuple(theirs for _, theirs in points) if case.reference else (),
        )
        for name, points in columns.items()
        if len(points) == len(x)
    ]


def _times(case: Case, factor: float) -> Case:
    i = case.wanted[0]
    scaled = (case.args[i].detach() * factor).requires_grad_()
    return replace(case, args=(*case.args[:i], scaled, *case.args[i + 1 :]))


def _errors(case: Case) -> Iterator[tuple[str, float | None, float | None]]:
    """(which result, our error, the reference's)."""
    exact = case.to(torch.float64)
    true_call = exact.call_reference if case.reference else exact.call
    dys = weights_for(outputs(case.call(*case.leaves)))
    truth = gradients(true_call, exact.leaves, [d.double() for d in dys])
    ours = gradients(case.call, case.leaves, dys)
    theirs = gradients(case.call_reference, case.leaves, dys) if case.reference else ours
    names = (
        [f"output {i}" if len(dys) > 1 else "output" for i in range(len(dys))],
        [f"gradient of argument {i}" for i in case.wanted],
    )
    for of_names, of_truth, of_ours, of_theirs in zip(names, truth, ours, theirs, strict=True):
        for name, true, our, their in zip(of_names, of_truth, of_ours, of_theirs, strict=True):
            if true is not None and our is not None and their is not None:
                yield name, _units(our, true), _units(their, true)


def _units(value: Tensor, truth: Tensor) -> float | None:
    """The largest error, in units in the last place of the largest true value."""
    value, truth = value.detach(), truth.detach()
    judged = truth.to(value.dtype).isfinite()
    if not judged.any():
        return 0.0
    largest = truth[judged].abs().max().item()
    off = (value.double() - truth)[judged].abs().max().item()
    if not math.isfinite(off):
        return None
    limits = torch.finfo(value.dtype)
    unit = math.ldexp(limits.eps, math.frexp(max(largest, limits.tiny))[1] - 1)
    return off / unit


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
