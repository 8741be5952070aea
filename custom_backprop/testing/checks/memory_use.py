"""What is allocated, and what is kept between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..case import Case, outputs, weights_for
from ..memory import peak_memory
from ..outcome import NotApplicable, first_sample
from .compare import require, with_reference
from .determinism import seeded
from .hooks import outside

#: seeds and counters
SLACK = 64


@first_sample
def memory_use(case: Case) -> dict[str, tuple[int, int]]:
    """Bytes saved for backward, and the peak of one forward and backward, beside the reference's.

    They are figures, since a small sample says little of a large one. Wrong is only what no sample
    excuses: more is saved than the reference saves, its inputs and its outputs together.

    Finds intermediate results that are kept though backward could compute them again.

    Returns:
        "saved" and "peak" -> (our bytes, the reference's).
    """
    with_reference(case)
    ours, theirs = saved_bytes(case, case.call), saved_bytes(case, case.call_reference)
    given = [a for a in tree_leaves((case.args, case.kwargs)) if isinstance(a, Tensor)]
    results = outputs(case.call_reference(*case.leaves))
    limit = theirs + sum(t.nbytes for t in (*given, *results)) + SLACK
    require(ours <= limit, f"{ours} bytes are saved, by the reference {theirs}")
    device = str(case.device)
    peaks = [peak_memory(_step(case, call), device) for call in (case.call, case.call_reference)]
    return {"saved": (ours, theirs), "peak": (peaks[0], peaks[1])}


def _step(case: Case, call: Callable[..., Any]) -> Callable[[], Any]:
    leaves = case.leaves

    def step() -> None:
        results = [r for r in outputs(call(*leaves)) if r.requires_grad]
        torch.autograd.grad(results, leaves, weights_for(results), allow_unused=True)

    return step


def saved_bytes(case: Case, call: Callable[..., Any]) -> int:
    """Bytes of the storages that a call keeps for backward, inputs and outputs included, each
    once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with seeded(case), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = [r for r in outputs(call(*case.leaves)) if r.requires_grad]
    if not results:
        raise NotApplicable("no output requires grad")
    for _, t in outside(results):
        pack(t)
    return sum(kept.values())
