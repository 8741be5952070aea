"""Values and gradients against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..case import Case, gradients, outputs
from ..outcome import NotOffered, feature
from .compare import as_reference, same, with_reference


@feature
def float64(case: Case) -> None:
    """The function computes in float64, so that its derivatives can be checked to twelve digits.

    Finds kernels that take float32 alone, or that compute in float32 whatever comes in. Such a
    function is checked in float32, against a truth in float64.
    """
    if case.refuses_float64:
        raise NotOffered(case.refuses_float64)


def forward(case: Case) -> None:
    """Same values, shapes and dtypes as the reference.

    Finds wrong formulas, results of another dtype or shape, and outputs in another order.
    """
    with_reference(case)
    as_reference(case, lambda function, leaves: outputs(function(*leaves)), "outputs")
    mine, others = (
        [t for t in tree_leaves(r) if isinstance(t, Tensor) and not t.is_floating_point()]
        for r in (case.call(*case.leaves), case.call_reference(*case.leaves))
    )
    same(mine, others, "outputs that are not floating-point")


def gradient(case: Case) -> None:
    """Same gradients as autograd gives for the reference, for random gradients of the outputs.

    Finds wrong signs and factors, dropped terms, and gradients in the wrong place. A plain sum
    would hide some of them: for a softmax its gradient is zero.
    """
    with_reference(case)
    as_reference(case, _gradients, "gradients")


def _gradients(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Any:
    return gradients(function, leaves)[1]
