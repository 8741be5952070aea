"""The heat map of a history: the gradient norm of layer x step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .reading import Reading


def norms(
    history: Iterable[Reading], names: Sequence[str]
) -> tuple[list[int], list[str], list[list[float]]]:
    """The steps with a reading, the layers of ``names`` that have gradients, and the norm of each
    layer (outer) at each step (inner), NaN if there is none."""
    readings = list(history)
    trained = [n for n in names if any(r[n].norm is not None for r in readings)]
    table = [[math.nan if (norm := r[n].norm) is None else norm for r in readings] for n in trained]
    return [r.step for r in readings], trained, table


def draw(
    axes: Any, steps: list[int], names: list[str], table: list[list[float]], **options: Any
) -> Any:
    """Draws what :func:`norms` returns into ``axes``. ``options`` go to ``pcolormesh``."""
    decades = [[math.log10(v) if 0 < v < math.inf else math.nan for v in row] for row in table]
    mesh = axes.pcolormesh(decades, **({"cmap": "viridis"} | options))
    ticks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks([t + 0.5 for t in ticks], [str(steps[t]) for t in ticks])
    labelled = range(0, len(names), -(-len(names) // 20))
    axes.set_yticks([i + 0.5 for i in labelled], [names[i] for i in labelled])
    axes.set(xlabel="step", ylabel="layer")
    axes.grid(False)
    axes.invert_yaxis()
    return mesh


def save(path: str | Path, steps: list[int], names: list[str], table: list[list[float]]) -> None:
    """Saves the same as a picture, with a colour bar.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat map needs: pip install matplotlib") from error
    height = max(2.5, 0.22 * len(names) + 1)
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    figure.colorbar(draw(figure.add_subplot(), steps, names, table), label="log10 ‖∂L/∂w‖")
    figure.savefig(path)
