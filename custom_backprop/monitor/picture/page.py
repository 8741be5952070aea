"""The page to explore a picture: its drawing, all data of the nodes, and a script, in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from .flow import BINS, LOW
from .graph import Node, size_text
from .svg import COLOURS, Drawing, decades

HERE = Path(__file__).parent
#: colour -> kind or mark, and what it is called
LEGEND = {
    "ours": ("ours", "ours"),
    "stock": ("stock", "PyTorch's"),
    "function": ("function", "another Function"),
    "compiled": ("compiled", "compiled"),
    "vanishing": ("vanishing", "vanishing"),
    "exploding": ("exploding", "exploding"),
    "zero": ("zero", "zero"),
    "bad": ("non-finite", "not finite"),
}


def page(drawing: Drawing, title: str, lines: Sequence[str], nodes: Sequence[Node]) -> str:
    """The HTML."""
    colours = "".join(f"--{name}: light-dark({a}, {b});" for name, (a, b) in COLOURS.items())
    style = "\n".join(_read(name) for name in ("picture.css", "page.css"))
    first, last = decades(nodes)
    data = {
        "nodes": [_data(node) for node in nodes],
        "histogram": {"first": first, "last": last, "low": LOW, "bins": BINS},
        "width": drawing.width,
        "height": drawing.height,
    }
    # inside a script "</" would end it
    encoded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    told = "".join(
        f'<p class="{"verdict " + line.split()[0] if i else "fact"}">{escape(line)}</p>'
        for i, line in enumerate(lines)
    )
    seen = {node.kind for node in nodes} | {node.mark for node in nodes}
    legend = "".join(
        f'<span><i style="background: var(--{name})"></i>{text}</span>'
        for name, (of, text) in LEGEND.items()
        if of in seen
    )
    if any(node.flow for node in nodes):
        low, high = (LOW + i // BINS for i in (first, last))
        legend += (
            "<span>right: norm of the gradient; bars: magnitudes of its elements, "
            f"10<sup>{low}</sup> to 10<sup>{high}</sup></span>"
        )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {colours} }}
{style}</style>
</head>
<body>
<header>
<div><h1>{escape(title)}</h1>{told}</div>
<div class="tools">
<input id="search" type="search" placeholder="Search: op, parameter, shape" aria-label="Search">
<span id="found"></span>
<button id="out" title="Zoom out (-)">−</button><button id="in" title="Zoom in (+)">+</button>
<button id="fit" title="Show all (0)">fit</button>
<button id="theme" title="Light or dark">◐</button>
</div>
</header>
<main>
<div id="canvas" tabindex="0" aria-label="The graph: drag to move it, turn the wheel to zoom">
<svg id="drawing" class="picture"><g id="view">
{drawing.body}
</g></svg>
<svg id="map" aria-hidden="true"><rect id="frame"/></svg>
<div class="legend">{legend}</div>
</div>
<aside id="panel"></aside>
</main>
<script type="application/json" id="data">{encoded}</script>
<script>
{_read("page.js")}</script>
</body>
</html>
"""


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _data(node: Node) -> dict[str, Any]:
    """A node for the script. JSON has no NaN and no infinity."""
    data = {**asdict(node), "bytes": size_text(node.bytes) if node.bytes else ""}
    data["saved"] = [
        {**asdict(s), "bytes": size_text(s.bytes) if s.bytes else ""} for s in node.saved
    ]
    return _finite(data)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
