"""Figures of ratios and of bandwidths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    ratios: dict[tuple[str, str], float],
    title: str,
    file: Path,
) -> None:
    """Ratios stock / ours by (row, column), blue where ours is better, red where it is worse. Cells
    without a ratio stay empty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    size = 3.2 + 0.8 * len(columns), 1.8 + 0.24 * len(rows)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(
        range(len(columns)), [c.replace(" ", "\n").replace("+", "\n+ ") for c in columns]
    )
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    colours, norm = plt.get_cmap("RdBu"), TwoSlopeNorm(1, vmin=0, vmax=3)
    for (row, column), ratio in ratios.items():
        x, y = columns.index(column), rows.index(row)
        red, green, blue, _ = colour = colours(norm(min(ratio, 3)))
        axis.add_patch(plt.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        style: Any = {"ha": "center", "va": "center", "fontsize": 8}
        axis.text(x, y, text, color="white" if dark else "black", **style)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def bandwidths(
    lengths: Sequence[str],
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]],
    title: str,
    file: Path,
) -> None:
    """TB/s against the length of rows: a panel for each direction, and in it of each op those of
    ours and of stock."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", sharey=True
    )
    for (direction, ops), axis in zip(panels.items(), axes, strict=True):
        for i, (op, (ours, stock)) in enumerate(ops.items()):
            axis.plot(lengths, ours, color=f"C{i}", marker="o", markersize=4, label=op)
            axis.plot(lengths, stock, color=f"C{i}", linestyle=":", label=f"{op}, stock")
        axis.set_title(direction)
        axis.set_xlabel("numbers in a row")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TB/s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)
