"""Whether the sample itself can show a mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..case import Case, is_float
from ..outcome import NotApplicable, NotRun, first_sample
from .derivatives import gradcheck
from .values import gradient

#: wrong factors that are planted: with a reference, and for gradcheck, whose tolerance is coarse
FINE, COARSE = 1.001, 1.1


@first_sample
def mutations(case: Case) -> None:
    """Mistakes that are planted into backward are seen by ``gradient`` (without a reference, by
    ``gradcheck``): a wrong factor or another sign in the gradient of each input, values in the
    wrong places, and an incoming gradient that is ignored.

    Finds weak samples: a gradient that is 0 or one number proves little, whatever the other checks
    say.
    """
    if not (case.reference or case.exact):
        raise NotApplicable("in float32 it needs a reference, and none was given")
    check, factor = (gradient, FINE) if case.reference else (gradcheck, COARSE)
    if _sees(check, case):
        raise NotApplicable("the gradient is wrong without a planted mistake")
    weak = [
        f"{mistake} in the gradient of input {i} is not seen"
        for i in range(len(case.wanted))
        for mistake, by in ((f"a factor of {factor}", factor), ("another sign", -1.0))
        if not _sees(check, _planted(case, {i: _times(by)}))
    ]
    moved = dict.fromkeys(range(len(case.wanted)), lambda g: g.reshape(-1).roll(1).reshape(g.shape))
    if not _sees(check, _planted(case, moved)):
        weak.append("values in the wrong places are not seen")
    if not _sees(check, _planted(case, {}, torch.ones_like)):
        weak.append("an incoming gradient that is ignored is not seen")
    if weak:
        raise NotRun("weak sample: " + "; ".join(weak))


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda g: factor * g


def _sees(check: Callable[[Case], Any], case: Case) -> bool:
    try:
        check(case)
    except Exception:
        return True
    return False


def _planted(
    case: Case,
    of_inputs: dict[int, Callable[[Tensor], Tensor]],
    of_outputs: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """The same call, with gradients changed on their way."""

    def function(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for i, change in of_inputs.items():
            given[case.wanted[i]] = _Changed.apply(given[case.wanted[i]], change)
        result = case.function(*given, **kwargs)
        return result if of_outputs is None else _mapped(result, of_outputs)

    return replace(case, function=function)


def _mapped(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return torch.utils._pytree.tree_map(
        lambda r: _Changed.apply(r, change) if is_float(r) else r, result
    )


class _Changed(torch.autograd.Function):
    """The identity, whose gradient is changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ctx.change(dy), None
