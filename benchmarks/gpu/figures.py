"""The results as pictures: ratios, bandwidth by the length of rows, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import heat_map
from .case import BOTH, DIRECTIONS
from .ceilings import Ceilings
from .page import short
from .results import Ratio, Row, ratios

COLORS = {
    "ours": "C0",
    "stock": "0.5",
    "compiled": "C1",
    "liger-kernel": "C2",
    "quack-kernels": "C3",
    "flash-linear-attention": "C4",
    "flash-attn": "C5",
}
DTYPE = "bfloat16"


def draw(machine: dict[str, Any], rows: Sequence[Row], file: Path) -> list[Path]:
    """Writes those for which there are figures, beside the file."""
    drawn = []
    for name, picture in (("", _ratios), ("-lengths", _lengths), ("-roofline", _roofline)):
        to = file.with_name(f"{file.stem}{name}.png")
        if picture(machine["card"], rows, to):
            drawn.append(to)
    return drawn


def _ratios(card: str, rows: Sequence[Row], file: Path) -> bool:
    """Of the best of the others, over ours: the op by direction and dtype, at the first length."""
    found: dict[tuple[str, str], float] = {}
    for r in ratios(rows):
        column = f"{(r.ours.dtype or '').replace('bfloat', 'b').replace('float', 'f')} "
        found.setdefault((r.ours.op, column + (r.ours.direction or "")), r.ratio)
    if not found:
        return False
    columns = sorted({c for _, c in found}, key=lambda c: (c[0], DIRECTIONS.index(c.split()[1])))
    title = f"The best of stock, torch.compile and the peers / ours, {card}: above 1 ours is faster"
    heat_map(list(dict.fromkeys(op for op, _ in found)), columns, found, title, file)
    return True


def _lengths(card: str, rows: Sequence[Row], file: Path) -> bool:
    """TB/s by the length of rows: a line for each op, a panel for each direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.n and row.tbps and not row.flops and row.dtype == DTYPE:
            by = found.setdefault((row.op, row.direction or ""), {})
            by.setdefault(row.who, []).append((row.n, row.tbps))
    if not found:
        return False
    ops = list(dict.fromkeys(op for op, _ in found))
    ceiling = Ceilings.of(rows).copy / 1e12
    figure, axes = plt.subplots(
        len(ops), len(DIRECTIONS), figsize=(12, 2.2 * len(ops) + 1.4), layout="constrained",
        sharex=True, squeeze=False,
    )  # fmt: skip
    for op, line in zip(ops, axes, strict=True):
        for direction, axis in zip(DIRECTIONS, line, strict=True):
            for who, points in found.get((op, direction), {}).items():
                x, y = zip(*sorted(points), strict=True)
                axis.plot(x, y, color=COLORS.get(who), marker="o", markersize=3, label=who)
            axis.axhline(ceiling, color="black", linewidth=0.8, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{op}, {direction}", fontsize=9)
            axis.grid(alpha=0.3)
    lengths = sorted({n for by in found.values() for points in by.values() for n, _ in points})
    axes[-1][0].set_xticks(lengths, map(short, lengths), fontsize=7)
    known = {label: handle for axis in axes.flat for handle, label in zip(
        *axis.get_legend_handles_labels(), strict=True
    )}  # fmt: skip
    figure.legend(known.values(), known, loc="outside lower center", ncols=len(known))
    figure.suptitle(f"TB/s of the fewest bytes, by the length of rows: {DTYPE}, {card}")
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return True


def _roofline(card: str, rows: Sequence[Row], file: Path) -> bool:
    """Forward and backward at the first length. Left: ops that only move bytes, as a fraction of
    the copy. Right: ops with products."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first: dict[str, Ratio] = {}
    for r in ratios(rows):
        if r.ours.dtype == DTYPE and r.ours.direction == BOTH and r.ours.fraction:
            first.setdefault(r.ours.op, r)
    moved = [r for r in first.values() if not r.ours.flops]
    products = [r for r in first.values() if r.ours.flops and r.ours.bytes]
    if not moved and not products:
        return False
    ceilings = Ceilings.of(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, max(4.0, 0.19 * len(moved) + 1)), layout="constrained"
    )
    order = sorted(moved, key=lambda r: r.ours.fraction or 0)
    names = [r.ours.op for r in order]
    left.barh(names, [r.ours.fraction or 0 for r in order], color=COLORS["ours"], label="ours")
    best = [r.best.fraction or 0 for r in order]
    left.plot(best, names, "|", color="black", markersize=9, label="the best of the others")
    left.axvline(1, color="black", linewidth=0.8, linestyle=":")
    left.tick_params(axis="y", labelsize=7)
    left.set_title("fraction of the speed of a copy")
    left.legend(loc="lower right")
    peak = ceilings.products.get(DTYPE, 0)
    knee = peak / ceilings.copy
    points = [
        ((row.flops or 0) / (row.bytes or 1), row.tflops or 0, row)
        for r in products
        for row in (r.best, r.ours)
    ]
    intensities = [knee, *(x for x, _, _ in points)]
    xs = [min(intensities) / 8, knee, max(intensities) * 4]
    right.loglog(xs, [min(x * ceilings.copy, peak) / 1e12 for x in xs], color="black")
    for x, y, row in points:
        right.plot(x, y, "o", color=COLORS.get(row.who), markersize=5, label=row.who)
        if row.who == "ours":
            right.annotate(f" {row.op}", (x, y), fontsize=7, va="center")
    known = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    right.legend(known.values(), known, loc="lower right")
    right.set_xlabel("floating-point operations a byte")
    right.set_ylabel("TFLOP/s")
    right.set_title("ops with products")
    right.grid(alpha=0.3, which="both")
    figure.suptitle(f"Forward and backward, {DTYPE}, {card}")
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return True
