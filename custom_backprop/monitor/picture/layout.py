"""A layered drawing of a graph without cycles (Sugiyama, Tagawa and Toda, 1981): a layer for each
length of the longest path, an order in each layer by barycentres, and positions by least
squares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

#: between neighbours of a layer, and between layers
ACROSS, DOWN = 28.0, 42.0
#: an edge over more layers than this one is drawn straight
LONG = 40
SWEEPS = 6
#: how much more it costs to move what is on the longest way
STRAIGHT = 1000.0


class Layout(NamedTuple):
    """Centre and upper edge of each box, and the lower edge of its layer; of each edge the points
    between its ends; the size."""

    x: list[float]
    y: list[float]
    floor: list[float]
    bends: dict[tuple[int, int], list[tuple[float, float]]]
    width: float
    height: float


def arrange(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """The layout of boxes of these (width, height), numbered so that edges lead to larger
    numbers."""
    layer = [0] * len(sizes)
    for a, b in sorted(edges):
        layer[b] = max(layer[b], layer[a] + 1)
    widths, layers = [w for w, _ in sizes], list(layer)
    chains: dict[tuple[int, int], list[int]] = {}
    links: list[tuple[int, int]] = []
    for a, b in edges:
        chain = []
        if 1 < layer[b] - layer[a] <= LONG:
            for level in range(layer[a] + 1, layer[b]):
                chain.append(len(layers))
                layers.append(level)
                widths.append(0.0)
        chains[a, b] = chain
        path = [a, *chain, b]
        if chain or layer[b] - layer[a] == 1:
            links += pairwise(path)
    rows: list[list[int]] = [[] for _ in range(max(layers, default=-1) + 1)]
    for v, level in enumerate(layers):
        rows[level].append(v)
    above: list[list[int]] = [[] for _ in layers]
    below: list[list[int]] = [[] for _ in layers]
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    _order(rows, above, below)
    x = _place(rows, above, below, widths)
    tops, y = [], 0.0
    for row in rows:
        tops.append(y)
        y += max((sizes[v][1] for v in row if v < len(sizes)), default=0.0) + DOWN
    tops.append(y)
    left = min((x[v] - widths[v] / 2 for v in range(len(x))), default=0.0)
    x = [at - left for at in x]
    bends = {
        edge: [(x[v], at) for v in chain for at in (tops[layers[v]], tops[layers[v] + 1] - DOWN)]
        for edge, chain in chains.items()
    }
    right = max((x[v] + widths[v] / 2 for v in range(len(x))), default=0.0)
    floors = [tops[level + 1] - DOWN for level in layer]
    return Layout(x, [tops[level] for level in layer], floors, bends, right, max(y - DOWN, 0.0))


def _order(rows: list[list[int]], above: list[list[int]], below: list[list[int]]) -> None:
    """Sorts each row by the mean position of its neighbours, down and up again."""
    place = {v: float(i) for row in rows for i, v in enumerate(row)}
    for sweep in range(2 * SWEEPS):
        near, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in order:
            key = {v: fmean(place[n] for n in near[v]) if near[v] else place[v] for v in row}
            row.sort(key=key.__getitem__)
            place.update({v: float(i) for i, v in enumerate(row)})


def _place(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]], widths: list[float]
) -> list[float]:
    """Puts each row where its neighbours are, as far as the order allows. From each vertex the
    longest way on goes straight down; what ends earlier makes room for it."""
    depth = [0] * len(widths)
    for row in reversed(rows):
        for v in row:
            depth[v] = max((depth[n] + 1 for n in below[v]), default=0)
    on = [
        _boxes_first([n for n in below[v] if depth[n] + 1 == depth[v]], widths)
        for v in range(len(widths))
    ]
    back: list[list[int]] = [[] for _ in widths]
    for v, straight in enumerate(on):
        for n in straight:
            back[n].append(v)
    back = [_boxes_first(straight, widths) for straight in back]
    x = [0.0] * len(widths)
    for row in rows:
        at = 0.0
        for v in row:
            x[v] = at + widths[v] / 2
            at += widths[v] + ACROSS
    for sweep in range(2 * SWEEPS + 1):
        order = rows if sweep % 2 == 0 else rows[::-1]
        for row in order:
            near = [(back[v] or above[v]) if sweep % 2 == 0 else on[v] for v in row]
            wanted = [
                fmean(x[n] for n in at) if at else x[v] for v, at in zip(row, near, strict=True)
            ]
            weights = [STRAIGHT if back[v] and widths[v] else 1.0 for v in row]
            for v, at in zip(row, _apart(wanted, weights, [widths[v] for v in row]), strict=True):
                x[v] = at
    return x


def _boxes_first(vertices: list[int], widths: list[float]) -> list[int]:
    """The boxes of these vertices; if there is none, the bends of edges."""
    return [v for v in vertices if widths[v]] or vertices


def _apart(wanted: list[float], weights: list[float], widths: list[float]) -> list[float]:
    """The positions nearest to the wanted ones, by weighted least squares, at which nothing
    overlaps: pools adjacent violators."""
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + ACROSS)
    blocks: list[list[float]] = []  # mean, weight, count
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        blocks.append([want - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, heavy, count = blocks.pop()
            total = blocks[-1][1] + heavy
            blocks[-1][0] = (blocks[-1][0] * blocks[-1][1] + mean * heavy) / total
            blocks[-1][1:] = [total, blocks[-1][2] + count]
    spread = [block[0] for block in blocks for _ in range(int(block[2]))]
    return [at + offset for at, offset in zip(spread, offsets, strict=True)]
