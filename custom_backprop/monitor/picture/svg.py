"""Draws boxes as SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from math import isfinite, log10
from pathlib import Path

from .boxes import Box, Row, fold
from .flow import BINS, HIGH, LOW
from .graph import Flow, Node, number_text, shape_text, size_text
from .layout import arrange

#: name -> colour on a light and on a dark background
COLOURS = {
    "paper": ("#fafaf7", "#12151a"),
    "card": ("#ffffff", "#1b2027"),
    "ink": ("#1d2127", "#e7eaee"),
    "soft": ("#5d6672", "#a3adb9"),
    "faint": ("#8a94a1", "#7a8592"),
    "line": ("#dfe2e6", "#2c333c"),
    "hover": ("#f1f4f8", "#252c35"),
    "edge": ("#b4bcc7", "#4a5461"),
    "spark": ("#7b8ba3", "#7f93b2"),
    "ours": ("#0f9d76", "#35c79b"),
    "stock": ("#a9b1bc", "#5f6a77"),
    "function": ("#8a63d2", "#ab8cf0"),
    "compiled": ("#d19a1b", "#e8b84a"),
    "vanishing": ("#2f6fed", "#6ea0ff"),
    "exploding": ("#e0552b", "#ff7a4d"),
    "zero": ("#a3a3a3", "#7d7d7d"),
    "bad": ("#c2188f", "#f062c0"),
}
WIDTH, HEADER, ROW, LEAF, THIN, PAD = 400.0, 24.0, 42.0, 17.0, 19.0, 12.0
#: of a box that only shapes numbers
NARROW = 216.0
#: of a histogram
SPARK_X, SPARK_WIDTH, SPARK_HEIGHT = 250.0, 76.0, 20.0
MARGIN, HEADING = 28.0, 92.0
#: a bin with this fraction of the elements or less may be outside the drawn range
FEW = 0.005
#: letters of a formula in a row
FORMULA = 46


def style() -> str:
    """The style of a file of its own. Its colours are written out, since few programs but browsers
    know variables."""
    rules = Path(__file__).with_name("picture.css").read_text(encoding="utf-8")
    light = re.sub(r"var\(--(\w+)\)", lambda name: COLOURS[name[1]][0], rules)
    dark = re.sub(r"var\(--(\w+)\)", lambda name: COLOURS[name[1]][1], rules)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


class Drawing:
    """The SVG of a graph. ``body`` has no heading, which a page has of its own."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._boxes = fold(nodes)
        self._first, self._last = decades(nodes)
        norms = [n.flow.norm for n in nodes if n.flow and n.flow.norm > 0 and isfinite(n.flow.norm)]
        self._low, self._high = min(norms, default=1.0), max(norms, default=1.0)
        edges = [(i, to) for i, box in enumerate(self._boxes) for to in box.to]
        self._layout = arrange([(_width(box), _height(box)) for box in self._boxes], edges)
        self.width, self.height = self._layout.width, self._layout.height
        lines = [line for a, b in edges for line in self._edge(a, b)]
        for i, box in enumerate(self._boxes):
            lines += self._box(box, self._layout.x[i] - _width(box) / 2, self._layout.y[i])
        self.body = "\n".join(lines)

    def svg(self, title: str, lines: Sequence[str]) -> str:
        """A file of its own, with a heading."""
        width = max(self.width, 620.0) + 2 * MARGIN
        above = HEADING + 16 * max(0, len(lines) - 2)
        height = self.height + above + MARGIN
        heading = "".join(
            f'<text class="summary" x="{MARGIN}" y="{58 + 17 * i}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" width="{width:.0f}" '
            f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n'
            f"<title>{escape(title)}</title>\n<style>{style()}</style>\n"
            f'<rect class="paper" width="100%" height="100%"/>\n'
            f'<text class="title" x="{MARGIN}" y="36">{escape(title)}</text>{heading}\n'
            f'<g transform="translate({(width - self.width) / 2:.1f} {above:.1f})">\n'
            f"{self.body}\n</g>\n</svg>\n"
        )

    def _edge(self, a: int, b: int) -> Iterator[str]:
        last = self._boxes[a].rows[-1].nodes[-1]
        first = self._boxes[b].rows[0].nodes[0]
        sent = [e for e in last.edges if e.to == first.index]
        norm = max((e.norm for e in sent if e.norm is not None), default=None)
        layout = self._layout
        points = [
            (layout.x[a], layout.y[a] + _height(self._boxes[a])),
            (layout.x[a], layout.floor[a]),
            *layout.bends[a, b],
            (layout.x[b], layout.y[b]),
        ]
        path = f"M{_pair(points[0])}"
        for (x, y), (to_x, to_y) in pairwise(points):
            middle = (y + to_y) / 2
            path += f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
        mark = next((e.mark for e in sent if e.mark), "")
        told = f"{_name(last)} → {_name(first)}: ‖g‖ {number_text(norm)}"
        wide = 1.2 + 4 * self._level(norm)
        yield (
            f'<path class="edge {mark}" d="{path}" stroke-width="{wide:.1f}">'
            f"<title>{escape(told)}</title></path>"
        )

    def _level(self, norm: float | None) -> float:
        """Where a norm is between the smallest and the largest, by decades."""
        if not norm or not isfinite(norm):
            return 0.0
        span = max(log10(self._high / self._low), 1.0)
        return min(1.0, max(0.0, 1 - log10(self._high / norm) / span))

    def _box(self, box: Box, x: float, y: float) -> Iterator[str]:
        yield f'<g class="box" transform="translate({x:.1f} {y:.1f})">'
        width = _width(box)
        yield f'<rect class="frame" width="{width:.0f}" height="{_height(box):.0f}" rx="9"/>'
        at = 4.0
        if box.module:
            yield f'<text class="module" x="{PAD}" y="17">{escape(box.module)}</text>'
            at = HEADER
        for i, row in enumerate(box.rows):
            if i and not (row.thin or box.rows[i - 1].thin):
                yield f'<path class="rule" d="M{PAD},{at:.0f}H{WIDTH - PAD:.0f}"/>'
            yield from self._row(row, box.module, at, width)
            at += _row_height(row)
        yield "</g>"

    def _row(self, row: Row, module: str, y: float, width: float) -> Iterator[str]:
        node = row.nodes[0]
        indices = " ".join(str(n.index) for n in row.nodes)
        yield f'<g class="row {node.mark}" data-node="{indices}">'
        yield (
            f'<rect class="back" x="1" y="{y:.0f}" width="{width - 2:.0f}" '
            f'height="{_row_height(row):.0f}"/>'
        )
        shape = ", ".join(map(shape_text, node.shapes[:2])) + ("…" if len(node.shapes) > 2 else "")
        if row.thin:
            names = " · ".join(n.op for n in row.nodes)
            yield _text("thin", PAD + 11, y + 13, _cut(names, int(width / 6 - 14)))
            yield _text("shape end", width - PAD, y + 13, _cut(shape, 14)) + "</g>"
            return
        yield f'<circle class="dot {node.kind}" cx="{PAD + 2:.0f}" cy="{y + 13:.0f}" r="3.5"/>'
        yield f'<text class="op" x="{PAD + 11:.0f}" y="{y + 17:.0f}">{_names(row, module)}</text>'
        yield _text("formula", PAD + 11, y + 33, _cut(_backward(node.formula), FORMULA))
        if node.flow:
            yield self._spark(node.flow, y + 4)
        yield _text(f"norm end {node.mark}", WIDTH - PAD, y + 17, number_text(node.norm))
        yield _text("shape end", WIDTH - PAD, y + 33, _cut(shape, 16))
        for i, (leaf, between, norm) in enumerate(row.leaves):
            at = y + ROW + 10 + LEAF * i
            name = leaf.label.removeprefix(row.module).lstrip(".") or leaf.label
            indices = " ".join(str(n.index) for n in (leaf, *between))
            yield f'<g class="leaf {leaf.mark}" data-node="{indices}">'
            yield (
                f'<rect class="back" x="1" y="{at - 12:.0f}" width="{WIDTH - 2:.0f}" '
                f'height="{LEAF:.0f}"/>'
            )
            told = f"{name} {shape_text(leaf.shapes[0])}" if leaf.shapes else name
            yield _text("weight", PAD + 11, at, "↳ " + _cut(told, 34))
            if leaf.flow:
                yield self._spark(leaf.flow, at - 10, 12)
            yield _text(f"norm small end {leaf.mark}", WIDTH - PAD, at, number_text(norm))
            yield "</g>"
        yield "</g>"

    def _spark(self, flow: Flow, y: float, height: float = SPARK_HEIGHT) -> str:
        bins = flow.histogram[self._first : self._last]
        top = max(bins, default=0)
        if not top:
            return ""
        step, base = SPARK_WIDTH / len(bins), y + height
        path = f"M{SPARK_X:.0f},{base:.1f}"
        for count in bins:
            path += f"V{base - height * count / top:.1f}h{step:.2f}"
        axis = f"M{SPARK_X:.0f},{base:.1f}h{SPARK_WIDTH:.0f}"
        return f'<path class="axis" d="{axis}"/><path class="spark" d="{path}V{base:.1f}z"/>'


def _names(row: Row, module: str) -> str:
    """The op, the module or tensor that it belongs to, and what it holds, as far as there is
    room."""
    node, room = row.nodes[0], SPARK_X - PAD - 18
    name = _cut(node.op if node.kind != "leaf" else node.label, 27)
    own = row.module.removeprefix(module)
    about = node.label if node.named and node.kind != "leaf" else own
    more = [("label", _cut(about.lstrip("."), 16), 6.6)] if about.lstrip(".") else []
    more += [("bytes", size_text(node.bytes), 6.2)] if node.bytes else []
    told, used = escape(name), 8.4 * len(name)
    for kind, text, width in more:
        used += 7 + width * len(text)
        if used < room:
            told += f'<tspan class="{kind}" dx="7">{escape(text)}</tspan>'
    return told


def decades(nodes: Sequence[Node]) -> tuple[int, int]:
    """The first bin and the one after the last in which any node has more than a few elements, with
    at least four decades between them, at full decades."""
    histograms = [n.flow.histogram for n in nodes if n.flow]
    used = [i for bins in histograms for i, count in enumerate(bins) if count > FEW * sum(bins)]
    first, last = (min(used), max(used) + 1) if used else (-LOW * BINS, -LOW * BINS)
    first -= first % BINS
    last = max(last + -last % BINS, first + 4 * BINS)
    return first, min(last, (HIGH - LOW) * BINS)


def _backward(formula: str) -> str:
    """What stands after the semicolon, if there is one."""
    return formula.partition(";")[2].strip() or formula


def _name(node: Node) -> str:
    return f"{node.op} #{node.index}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind.strip()}" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


def _row_height(row: Row) -> float:
    return THIN if row.thin else ROW + LEAF * len(row.leaves) + (2 if row.leaves else 0)


def _height(box: Box) -> float:
    return (HEADER if box.module else 4.0) + sum(map(_row_height, box.rows)) + 5


def _width(box: Box) -> float:
    return NARROW if all(row.thin for row in box.rows) else WIDTH


def _pair(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"
