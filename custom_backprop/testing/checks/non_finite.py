"""NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, weights_for
from ..outcome import Wrong, feature, first_sample
from .compare import with_reference
from .determinism import seeded

VALUES = (math.nan, math.inf, -math.inf)

#: finite numbers in the same place, near and far. What none of them changes does not depend on it
PROBES = (100.0, -100.0, 2.0, -2.0)

Results = dict[str, Tensor | None]


@feature
@first_sample
def non_finite(case: Case) -> None:
    """One element of an input, or of an incoming gradient, is NaN or infinite. A result that
    depends on it is not finite where the reference's is NaN or infinite. One that does not depend
    on it is finite where the reference's is.

    Left open: what an infinity gives where it gives the reference NaN; the gradient of an input
    that is NaN, where torch's own loops do not agree; and a result that is 0 otherwise, since some
    multiply by 0 what others leave out.

    Finds a maximum that drops NaN, so that a run that diverged looks well; gradients that stay
    finite where a GradScaler waits for infinity; overflow; and a NaN that spreads to other rows.
    """
    with_reference(case)
    leaves = [leaf.detach() for leaf in case.leaves]
    dys = list(weights_for(outputs(case.call_reference(*leaves))))
    usual = _run(case, case.call_reference, leaves, dys)
    for at_input, tensors in ((True, leaves), (False, dys)):
        for i, t in enumerate(tensors):
            if not t.numel():
                continue

            def planted(value: float, at_input: bool = at_input, i: int = i) -> Any:
                if at_input:
                    return [*leaves[:i], _with(leaves[i], value), *leaves[i + 1 :]], dys
                return leaves, [*dys[:i], _with(dys[i], value), *dys[i + 1 :]]

            depends = _depends(case, usual, [planted(value) for value in PROBES])
            for value in VALUES:
                try:
                    expected = _run(case, case.call_reference, *planted(value))
                except (RuntimeError, ValueError):  # such as an argument that must be a probability
                    continue
                what = f"{value} in {'input' if at_input else 'the gradient of output'} {i}"
                ours = _run(case, case.call, *planted(value))
                for name, zero in usual.items():
                    a, b = ours.get(name), expected[name]
                    if a is None or b is None or zero is None:
                        continue
                    dropped = depends[name] & ~b.isfinite() & a.isfinite()
                    if math.isinf(value) or (at_input and name.startswith("gradient")):
                        dropped &= ~b.isnan()
                    spread = b.isfinite() & ~a.isfinite() & (zero != 0)
                    if math.isnan(value):
                        spread &= ~depends[name]
                    if (dropped | spread).any():
                        at = tuple((dropped | spread).nonzero()[0].tolist())
                        found = f"{name} at {at} is {a[at].item()}, the reference's {b[at].item()}"
                        raise Wrong(f"{what}: {found}")


def _with(t: Tensor, value: float) -> Tensor:
    """A copy with that element in its middle."""
    changed = t.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[t.numel() // 2] = value
    return changed


def _depends(case: Case, usual: Results, others: list[Any]) -> dict[str, Tensor]:
    """Which of the reference's results change if the element does."""
    changed = {
        name: torch.zeros_like(t, dtype=torch.bool) for name, t in usual.items() if t is not None
    }
    for given in others:
        try:
            found = _run(case, case.call_reference, *given)
        except (RuntimeError, ValueError):
            continue
        for name, of_one in changed.items():
            t, before = found[name], usual[name]
            if t is not None and before is not None:
                of_one |= (t != before) & ~(t.isnan() & before.isnan())
    return changed


def _run(
    case: Case, call: Callable[..., Any], values: Sequence[Tensor], dys: Sequence[Tensor]
) -> Results:
    """Outputs and gradients by name."""
    with seeded(case):
        leaves = [v.clone().requires_grad_() for v in values]
        results = outputs(call(*leaves))
        found: Results = {f"output {i}": r.detach() for i, r in enumerate(results)}
        attached = [(r, dy) for r, dy in zip(results, dys, strict=True) if r.requires_grad]
        if attached:
            of, weights = zip(*attached, strict=True)
            grads = torch.autograd.grad(of, leaves, weights, allow_unused=True)
            found |= {f"gradient {i}": g for i, g in enumerate(grads)}
        return found
