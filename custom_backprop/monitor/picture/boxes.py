"""Folds a graph into boxes: a chain of nodes is one box, a node in it one row. Nodes that only
shape numbers share a row; a parameter is a line in the row of the node that uses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .formulas import SHAPING
from .graph import Node
from .marks import module_of

#: what may happen to a parameter before it is used
PREPARING = (*SHAPING, "ToCopy")


@dataclass
class Row:
    """One node, or a few that only shape numbers, and the leaves that it uses: each with the nodes
    between, and the norm of the gradient from here."""

    nodes: list[Node]
    leaves: list[tuple[Node, list[Node], float | None]] = field(default_factory=list)

    @property
    def module(self) -> str:
        """What the names of its parameters have in common."""
        return _common(module_of(leaf.label) for leaf, _, _ in self.leaves if leaf.named)

    @property
    def thin(self) -> bool:
        return not self.leaves and all(node.op in SHAPING for node in self.nodes)


@dataclass
class Box:
    """A chain, and where its last node leads. ``module`` is what the names of its parameters have
    in common."""

    rows: list[Row]
    module: str = ""
    to: list[int] = field(default_factory=list)


def fold(nodes: Sequence[Node]) -> list[Box]:
    """The boxes, in the order in which backward runs."""
    senders: list[set[int]] = [set() for _ in nodes]
    for node in nodes:
        for edge in node.edges:
            senders[edge.to].add(node.index)
    # index -> the leaf that it only leads to, and the nodes up to it
    hidden: dict[int, tuple[Node, list[Node]]] = {}
    for node in reversed(nodes):
        if node.index == 0:
            continue
        if node.kind == "leaf":
            hidden[node.index] = node, []
        elif len(node.edges) == 1 and node.op in PREPARING and node.edges[0].to in hidden:
            leaf, between = hidden[node.edges[0].to]
            hidden[node.index] = leaf, [node, *between]
    shown = [node for node in nodes if node.index not in hidden]
    targets = {n.index: _once(e.to for e in n.edges if e.to not in hidden) for n in shown}
    above = {n.index: {s for s in senders[n.index] if s not in hidden} for n in shown}
    box_of: dict[int, int] = {}
    boxes: list[Box] = []
    for node in shown:
        (before,) = above[node.index] if len(above[node.index]) == 1 else (None,)
        if before is not None and targets[before] == [node.index]:
            box_of[node.index] = box_of[before]
            rows = boxes[box_of[before]].rows
        else:
            box_of[node.index] = len(boxes)
            rows = []
            boxes.append(Box(rows))
        leaves = [(*hidden[edge.to], edge.norm) for edge in node.edges if edge.to in hidden]
        row = Row([node], leaves)
        if row.thin and rows and rows[-1].thin:
            rows[-1].nodes.append(node)
        else:
            rows.append(row)
    for box in boxes:
        last = box.rows[-1].nodes[-1]
        box.to = _once(box_of[to] for to in targets[last.index])
        box.module = _common(
            module_of(leaf.label) for row in box.rows for leaf, _, _ in row.leaves if leaf.named
        )
    return boxes


def _common(names: Iterable[str]) -> str:
    """The first parts that all dotted names share."""
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _once(items: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(items))
