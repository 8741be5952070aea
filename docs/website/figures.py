"""Pictures as SVG in the page itself: text and axes have the colour of the page's text, in light
and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, COLOURS = "#010203", ("#e8590c", "#1c7ed6", "#37b24d")
LINES = ("solid", (0, (5, 1.5)), (0, (1, 1)))
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "custom_backprop", "font.size": 11,
    "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def curves(x: Tensor, lines: list[tuple[str, Tensor]], title: str) -> str:
    """Functions of x, each with its label, as an SVG."""
    with _axes(3.6) as (axes, text):
        for (label, y), colour, line in zip(lines, COLOURS, LINES, strict=False):
            axes.plot(x, _broken(y), label=label, color=colour, linestyle=line, linewidth=2)
        axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
        axes.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
        values = torch.cat([y for _, y in lines])
        low, high = float(values.min()), float(values.max())
        axes.set_ylim(max(low, -3.2) - 0.2, min(high, 4.2) + 0.2)
        axes.set_xlim(float(x[0]), float(x[-1]))
        axes.legend(frameon=False)
    return _inline(text.getvalue(), title)


def errors(x: Tensor, lines: list[tuple[str, Tensor]], title: str) -> str:
    """Errors over x, in units in the last place, as an SVG."""
    with _axes(2.8) as (axes, text):
        for (label, off), colour in zip(lines, COLOURS, strict=False):
            points = off.clamp(1e-2, 1e8)
            axes.plot(x, points, ".", label=label, color=colour, markersize=2.5, alpha=0.7)
        axes.axhline(0.5, color=INK, linewidth=0.6, alpha=0.5)
        axes.set_yscale("log")
        axes.set_xlim(float(x[0]), float(x[-1]))
        axes.set_ylabel("units in the last place")
        axes.legend(frameon=False, markerscale=4)
    return _inline(text.getvalue(), title)


@contextmanager
def _axes(height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, and the SVG that is written after that."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
        axes.set_xlabel("x")
        text = io.StringIO()
        yield axes, text
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


def _broken(y: Tensor) -> Tensor:
    """y with a gap where it jumps."""
    jumps = (y[1:] - y[:-1]).abs() > 0.2
    broken = y.clone()
    broken[1:][jumps] = float("nan")
    return broken


def _inline(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    head = (
        r'<svg viewBox="\1" role="img" class="figure" xmlns="http://www.w3.org/2000/svg" '
        rf'xmlns:xlink="http://www.w3.org/1999/xlink"><title>{title}</title>'
    )
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg, count=1, flags=re.DOTALL)
    return "\n".join(line for line in svg.split("\n") if line.strip())
