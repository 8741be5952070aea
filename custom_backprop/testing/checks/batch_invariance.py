"""Rows that do not depend on their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..case import Case, outputs, same_bits, weights_for
from ..outcome import NotApplicable, feature
from .compare import require


@feature
def batch_invariance(case: Case) -> None:
    """A row's results, forward and backward, have the same bits in every batch: alone, with fewer
    rows, with more.

    It applies to calls whose batches are named: ``rows``, the positions of the arguments of shape
    (rows, ...). Results are the outputs of shape (rows, ...) and the gradients of those arguments,
    in the case's dtype and in each below it that the function takes.

    Finds a sum whose order depends on how many rows there are, a kernel whose blocks are cut by the
    whole tensor and not by rows, and masked rows that leak into their neighbours. A served model
    then answers one question in several ways.
    """
    if not case.rows:
        raise NotApplicable("no argument is stated to be a batch of rows")
    counts = {case.args[i].shape[0] for i in case.rows}
    require(len(counts) == 1, f"the batches have {sorted(counts)} rows")
    (n,) = counts
    own = torch.float64 if case.exact else torch.float32
    for dtype in dict.fromkeys((own, *case.low_precision)):
        given = case.to(dtype)
        try:
            whole = _results(given, n, n)
        except Exception:
            if dtype == own:
                raise
            continue
        for count in sorted({1, 2, n - 1, n + 1, 2 * n + 5} - {0, n}):
            some = _results(given, n, count)
            for ours, theirs in zip(some, whole, strict=True):
                both = min(count, n)
                require(
                    same_bits(ours[:both], theirs[:both]),
                    f"rows in {dtype} have other bits in a batch of {count} than in one of {n}",
                )


def _results(case: Case, n: int, count: int) -> list[Tensor]:
    """Outputs and gradients that have a row for each of a batch: the first ``count`` of the ``n``
    rows, which are repeated if there are not as many."""
    index = torch.arange(count, device=case.device) % n

    def taken(i: int, a: Any) -> Any:
        return a.detach()[index].requires_grad_(a.requires_grad) if i in case.rows else a

    some = replace(case, args=tuple(taken(i, a) for i, a in enumerate(case.args)))
    leaves = some.leaves
    rows = [r for r in outputs(some.call(*leaves)) if r.shape[:1] == index.shape]
    if not rows:
        raise NotApplicable("no output has a row for each of the batch")
    mine = [x for x, i in zip(leaves, some.wanted, strict=True) if i in some.rows]
    attached = [r for r in rows if r.requires_grad]
    grads: Sequence[Tensor | None] = ()
    if attached and mine:
        dys = weights_for([r[:1].expand(n, *r.shape[1:]) for r in attached])
        grads = torch.autograd.grad(attached, mine, [dy[index] for dy in dys], allow_unused=True)
    return [*(r.detach() for r in rows), *(g for g in grads if g is not None)]
