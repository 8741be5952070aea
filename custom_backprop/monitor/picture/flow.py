"""Runs backward and measures the gradients on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dtensor import local
from ..sums import dtype_of, sums_of
from .graph import Flow, Node, leaf_of

#: histograms have this many bins a decade, from 10^LOW to 10^HIGH; what is beyond is in the last
LOW, HIGH, BINS = -24, 16, 2
#: so many elements of a gradient are counted at most, at equal distances
COUNTED = 2**20


def measure(loss: Tensor, order: list[Any], nodes: list[Node]) -> None:
    """Fills in ``flow`` and the norms of the edges, by one backward that changes nothing: leaves
    get no gradient, the graph stays, hooks are removed and random numbers put back."""
    leaves = [i for i, node in enumerate(order) if leaf_of(node) is not None]
    hooks = [
        node.register_hook(_hook(node, data))
        for node, data in zip(order, nodes, strict=True)
        if data.kind != "leaf"
    ]
    cards = {d.index for d in map(torch.device, {n.device for n in nodes}) if d.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(cards)):
            grads = torch.autograd.grad(
                loss, [leaf_of(order[i]) for i in leaves], retain_graph=True, allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    for i, gradient in zip(leaves, grads, strict=True):
        nodes[i].flow = flow_of([gradient])


def _hook(node: Any, data: Node) -> Any:
    slots = [i for i, (to, _) in enumerate(node.next_functions) if to is not None]

    def note(sent: Sequence[Tensor | None], got: Sequence[Tensor | None]) -> None:
        data.flow = flow_of(got)
        for edge, slot in zip(data.edges, slots, strict=True):
            gradient = sent[slot] if slot < len(sent) else None
            edge.norm = None if gradient is None else norm_of(gradient)

    return note


@torch.no_grad()
def flow_of(gradients: Sequence[Tensor | None]) -> Flow | None:
    """The statistics of all elements together."""
    given = [local(g) for g in gradients if g is not None]
    if not given:
        return None
    rows = [[float(x) for x in sums_of(g)] for g in given]
    norms, sums, nonzeros, nonfinites, counts = zip(*rows, strict=True)
    count = sum(counts)
    norm = math.hypot(*norms)
    mean = sum(sums) / count if count else 0.0
    return Flow(
        norm,
        mean,
        math.sqrt(max(norm * norm / count - mean * mean, 0)) if count else 0.0,
        1 - sum(nonzeros) / count if count else 0.0,
        sum(nonfinites) / count if count else 0.0,
        tuple(sum(bins) for bins in zip(*map(_histogram, given), strict=True)),
    )


@torch.no_grad()
def norm_of(gradient: Tensor) -> float:
    return float(sums_of(local(gradient))[0])


def _histogram(gradient: Tensor) -> list[int]:
    x = gradient.coalesce().values() if gradient.is_sparse else gradient
    x = x.flatten()[:: max(1, x.numel() // COUNTED)].abs()
    x = x.to(dtype_of(x))
    x = x[(x > 0) & x.isfinite()]
    bins = ((x.log10() - LOW) * BINS).floor().clamp(0, (HIGH - LOW) * BINS - 1).long()
    return torch.bincount(bins, minlength=(HIGH - LOW) * BINS).tolist()
