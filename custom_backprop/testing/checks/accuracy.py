"""The inputs for which float32 is worst."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..case import Case, gradients, outputs, weights_for
from ..outcome import NotApplicable, Wrong, costly, feature
from ..sweep import units_off
from .compare import largest, with_reference
from .determinism import seeded

#: powers of 2 by which inputs are multiplied first, and how often the worst is then refined
SCALES, ROUNDS = (-12, -6, -3, 0, 2, 4, 6), 4

#: elements of an elementwise function that are tried at once
POINTS = 1024

#: more units than this: no digit is right. Fewer than that: half of them are
LOST, KEPT = 2.0**21, 2.0**12

#: result -> (our worst error, the reference's)
Errors = dict[str, tuple[float, float]]


@feature
@costly
def accuracy(case: Case) -> Errors:
    """The worst errors in float32 against a truth in float64, and the reference's worst, each with
    inputs that a search found: it varies magnitudes, goes on from the worst, and refines.

    Errors are in units in the last place: of each element, if the function is elementwise; else of
    the largest element. They are figures; ``precision`` judges. Wrong is only a result without one
    right digit where half of the reference's digits are.

    Finds cancellation and overflow at inputs that nobody tried, such as log(1 + exp(x)) at 100.

    Returns:
        "value" and "gradient" -> (our worst error, the reference's).
    """
    with_reference(case)
    if torch.float32 not in case.low_precision:
        raise NotApplicable("float32 is not asked for")
    worst: dict[str, list[float]] = {}
    for who in (0, 1):
        for pair in _search(case, who):
            for name, errors in pair.items():
                so_far = worst.setdefault(name, [0.0, 0.0])
                for k in (0, 1):
                    so_far[k] = max(so_far[k], errors[k])
    if not worst:
        raise NotApplicable("no input gives finite results")
    return {name: (ours, theirs) for name, (ours, theirs) in worst.items()}


def _search(case: Case, who: int) -> Iterator[Errors]:
    """The errors of every input that is tried; those of ``who`` (0: ours) decide where to go on."""
    count = len(case.leaves)
    best, at = -1.0, [0.0] * count

    def tried(exponents: list[float], seed: int) -> Iterator[Errors]:
        nonlocal best, at
        errors = _errors(case, exponents, seed)
        if errors:
            most = max(e[who] for e in errors.values())
            if math.isfinite(most) and most > best:
                best, at = most, exponents
            yield errors

    for scale in SCALES:
        yield from tried([float(scale)] * count, 0)
    step = 1.5
    for seed in range(1, ROUNDS + 1):
        for i, sign in itertools.product(range(min(count, 3)), (1, -1)):
            yield from tried([e + sign * step * (k == i) for k, e in enumerate(at)], seed)
        step /= 2


def _errors(case: Case, exponents: list[float], seed: int) -> Errors:
    """Our errors and the reference's; none where the truth is not finite."""
    generator = torch.Generator().manual_seed(seed)
    args = list(case.args)
    for position, leaf, exponent in zip(case.wanted, case.leaves, exponents, strict=True):
        x = leaf.detach()
        if case.elementwise and x.numel():
            x = x.reshape(-1).repeat(1 + POINTS // x.numel())
        drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        factor = 2.0 ** (exponent + (drawn - 0.5 if seed or case.elementwise else 0 * drawn))
        args[position] = (x * factor).float().requires_grad_()
    single = replace(case, args=tuple(args)).to(torch.float32)
    exact = single.to(torch.float64)
    try:
        dys = weights_for(outputs(exact.call_reference(*exact.leaves)))
        truth = _results(exact, exact.call_reference, dys)
        theirs = _results(single, single.call_reference, [dy.float() for dy in dys])
    except (RuntimeError, ValueError):
        return {}
    ours = _results(single, single.call, [dy.float() for dy in dys])
    found: Errors = {}
    for (name, our), their, true in zip(ours, theirs, truth, strict=True):
        if our is None or their[1] is None or true[1] is None or not true[1].numel():
            continue
        off, stock = (_units(t, true[1], case.elementwise) for t in (our, their[1]))
        if off >= LOST and stock <= KEPT:
            given = [
                f"{tuple(a.shape)} * 2^{e:.3g}" for a, e in zip(case.leaves, exponents, strict=True)
            ]
            raise Wrong(
                f"no digit of the {name} in float32 is right for input {', '.join(given)}: off by "
                f"{off:.1e} units, the reference's by {stock:.1e}"
            )
        before = found.get(name, (0.0, 0.0))
        found[name] = (max(before[0], off), max(before[1], stock))
    return found


def _results(case: Case, call: Any, dys: Any) -> list[tuple[str, Tensor | None]]:
    with seeded(case):
        results, grads = gradients(call, case.leaves, dys)
    return [*(("value", r.detach()) for r in results), *(("gradient", g) for g in grads)]


def _units(value: Tensor, truth: Tensor, elementwise: bool) -> float:
    """The largest error in units in the last place, where the truth is a number of float32."""
    limit = torch.finfo(torch.float32)
    judged = truth.isfinite() & (truth.abs() <= limit.max)
    if not judged.any():
        return 0.0
    if elementwise:
        off = units_off(value, truth)
    else:
        scale = max(largest(truth), limit.tiny)
        off = (value.double() - truth).abs() / (limit.eps * scale)
    return torch.where(judged, off.nan_to_num(nan=math.inf), 0.0).max().item()
