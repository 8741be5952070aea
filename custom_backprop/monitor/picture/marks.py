"""Which gradients vanish or explode on their way from the loss, by the monitor's own rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..judge import FALL, falls, judge
from ..reading import Layer, Reading, Verdict
from .graph import Node


def mark(nodes: Sequence[Node]) -> None:
    """Fills in ``mark`` of nodes and edges.

    The gradient comes to a node along many paths; that of its largest parts, back to the loss, is
    the one that says how it came about. On it, ``judge.falls`` decides: a gradient has vanished if
    it, and all after it, is four decades below the largest before, in steps of which none counts
    more than two. It has exploded if the same is true of its reciprocal.
    """
    path = _origins(nodes)
    for node in nodes:
        node.mark = _plain_mark(node)
        if not node.edges:
            _judge_path(_path_to(node, path))
    for node in nodes:
        for edge in node.edges:
            edge.mark = nodes[edge.to].mark if edge.norm != 0 else "zero"


def _origins(nodes: Sequence[Node]) -> dict[int, Node]:
    """Of each node, the one that sends it the largest gradient."""
    found: dict[int, tuple[float, Node]] = {}
    for node in nodes:
        for edge in node.edges:
            norm = -1.0 if edge.norm is None else edge.norm
            if edge.to not in found or norm > found[edge.to][0]:
                found[edge.to] = norm, node
    return {to: node for to, (_, node) in found.items()}


def _path_to(node: Node, origins: dict[int, Node]) -> list[Node]:
    path = [node]
    while (before := origins.get(path[-1].index)) is not None:
        path.append(before)
    return path[::-1]


def _plain_mark(node: Node) -> str:
    if node.flow is None:
        return ""
    if node.flow.nonfinite:
        return "non-finite"
    return "zero" if node.flow.norm == 0 else ""


def _judge_path(path: list[Node]) -> None:
    # a scalar's gradient says nothing of the loss yet: a mean of n numbers divides it by √n
    spread = [n for n in path if n.flow and math.isfinite(n.flow.norm) and n.flow.norm > 0]
    while len(spread) > 1 and all(math.prod(shape) == 1 for shape in spread[0].shapes):
        spread = spread[1:]
    norms = [node.flow.norm for node in spread if node.flow]
    for kind, values in (("vanishing", norms), ("exploding", [1 / norm for norm in norms])):
        for node, fall in zip(spread, falls(values), strict=True):
            if fall >= FALL:
                node.mark = kind


def verdicts(nodes: Sequence[Node]) -> list[Verdict]:
    """What a :class:`~custom_backprop.monitor.GradientMonitor` says of the parameters' gradients.
    The layers are the modules, by the names of their parameters, in the order of forward."""
    layers: dict[str, list[Node]] = {}
    reached: set[int] = set()
    for node in nodes:
        leaves = [nodes[e.to] for e in node.edges if nodes[e.to].kind == "leaf"]
        for leaf in leaves:
            if leaf.index not in reached and leaf.flow is not None:
                reached.add(leaf.index)
                layers.setdefault(module_of(leaf.label), []).append(leaf)
    found = [_layer(name, leaves) for name, leaves in reversed(layers.items())]
    if not found:
        return []
    total = math.hypot(*(layer.norm or 0.0 for layer in found))
    return judge(Reading(0, total, None, tuple(found)), ())


def _layer(name: str, leaves: Sequence[Node]) -> Layer:
    flows = [leaf.flow for leaf in leaves if leaf.flow is not None]
    counts = [max(1, sum(flow.histogram)) for flow in flows]
    nonfinite = sum(f.nonfinite * n for f, n in zip(flows, counts, strict=True)) / sum(counts)
    return Layer(name, norm=math.hypot(*(flow.norm for flow in flows)), nonfinite=nonfinite)


def module_of(parameter: str) -> str:
    """The name of the module of a parameter with this name."""
    return parameter.rpartition(".")[0] or parameter
