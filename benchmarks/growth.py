"""``python -m benchmarks.growth``: how the time of forward + backward grows with depth, width,
batch and length of the sequence.

It writes a table, a plot of four panels and the figures to
``benchmarks/results/growth.{md,png,json}``. Each slope is that of log(time) over log(size), by
least squares over the upper half of the sizes: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import custom_backprop
from custom_backprop.cli.progress import progress
from custom_backprop.cost import cost

from .measure import Recorded, Timer
from .report import RESULTS, machine_of


class Attention(nn.Module):
    """Self-attention of 4 heads over (batch, length, features)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def mlp(depth: int, width: int) -> nn.Module:
    return nn.Sequential(
        *(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU()))
    )


@dataclass(frozen=True)
class Axis:
    """What grows: the sizes, and the model and input of one size."""

    name: str
    fixed: str
    sizes: tuple[int, ...]
    build: Callable[[int], tuple[nn.Module, Tensor]]


AXES = (
    Axis(
        "depth",
        "width 256, batch 64",
        (1, 2, 4, 8, 16, 32),
        lambda n: (mlp(n, 256), torch.rand(64, 256)),
    ),
    Axis(
        "width",
        "depth 4, batch 64",
        (32, 64, 128, 256, 512, 1024),
        lambda n: (mlp(4, n), torch.rand(64, n)),
    ),
    Axis(
        "batch",
        "depth 4, width 256",
        (64, 128, 256, 512, 1024, 2048),
        lambda n: (mlp(4, 256), torch.rand(n, 256)),
    ),
    Axis(
        "sequence",
        "attention, 64 features, batch 1",
        (64, 128, 256, 512, 1024, 2048),
        lambda n: (Attention(64), torch.rand(1, n, 64)),
    ),
)

ABOUT = """Times are those of forward + backward. Each round times every size, stock and ours, once;
the fastest round counts. On a CPU it is CPU time, which other programs change only through shared
caches; on a GPU it is the time of CUDA graphs. Slopes are by least squares over the upper half of
the sizes: 1 is linear, 2 quadratic. Flops and bytes are counts (`custom_backprop.cost`, stock).
Written by `python -m benchmarks.growth`."""

#: what is fitted, and the heading of its column
FIGURES = {"stock": "time, stock", "ours": "time, ours", "flops": "flops", "saved": "bytes saved"}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) over log(size), by least squares over the upper half of the sizes,
    which are in ascending order."""
    half = len(sizes) // 2
    x, y = ([math.log(v) for v in those[half:]] for those in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The slope of each figure, for the rows of one axis."""
    return {
        figure: slope([r["size"] for r in rows], [r[figure] for r in rows]) for figure in FIGURES
    }


def measured(axis: Axis, device: str, seconds: float) -> list[dict[str, Any]]:
    """One row per size: the counted cost of a step, and its seconds, stock and ours: the fastest of
    several rounds, each of which times every size."""
    rows: list[dict[str, Any]] = []
    timers: list[tuple[dict[str, Any], str, Timer]] = []
    timer_of: Callable[[Callable[[], None]], Timer] = Recorded if device == "cuda" else on_processor
    for size in axis.sizes:
        built, x = axis.build(size)
        model, x = built.to(device), x.to(device)
        report = cost(model, x)
        total = report.stock.total
        row = {
            "axis": axis.name,
            "size": size,
            "parameters": total.parameters,
            "flops": total.forward_flops + total.backward_flops,
        }
        rows.append(row | {"saved": total.saved_bytes, "ours_saved": report.ours.total.saved_bytes})
        ours = custom_backprop.convert(copy.deepcopy(model))
        timers += [
            (rows[-1], "stock", timer_of(step(model, x))),
            (rows[-1], "ours", timer_of(step(ours, x))),
        ]
    calls = [max(1, int(2e-3 / timer(3))) for _, _, timer in timers]
    end = time.perf_counter() + seconds * len(axis.sizes)
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for (found, side, timer), count in zip(timers, calls, strict=True):
            found[side] = min(found.get(side, math.inf), timer(count))
        rounds += 1
    return rows


def on_processor(run: Callable[[], None]) -> Timer:
    """Times one call in CPU time, which does not include other programs."""

    def timer(calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    return timer


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    dy = torch.ones_like(model(x))

    def run() -> None:
        model.zero_grad()
        model(x).backward(dy)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for each size; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with progress(len(AXES), "axis") as bar:
        for axis in AXES:
            bar.set_postfix_str(axis.name)
            rows += measured(axis, args.device, args.seconds)
            bar.update()
    args.out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(args.device)
    fitted = {axis.name: slopes([r for r in rows if r["axis"] == axis.name]) for axis in AXES}
    (args.out / "growth.json").write_text(
        json.dumps({"machine": machine, "slopes": fitted, "rows": rows}, indent=1) + "\n"
    )
    page = markdown(machine, fitted)
    (args.out / "growth.md").write_text(page)
    plot(rows, fitted, args.out / "growth.png")
    print(page)
    print(
        f"wrote {', '.join(str(args.out / f'growth.{kind}') for kind in ('json', 'md', 'png'))}",
        file=sys.stderr,
    )
    return 0


def markdown(machine: dict[str, Any], fitted: dict[str, dict[str, float]]) -> str:
    lines = [
        "# How a step grows: slopes of log by log",
        "",
        "; ".join(f"{k}: {v}" for k, v in machine.items()) + ".",
        "",
        ABOUT,
        "",
        f"| what grows | sizes | the rest | {' | '.join(FIGURES.values())} |",
        "|---" * (len(FIGURES) + 3) + "|",
    ]
    for axis in AXES:
        values = " | ".join(f"{fitted[axis.name][figure]:.2f}" for figure in FIGURES)
        lines.append(
            f"| {axis.name} | {axis.sizes[0]} to {axis.sizes[-1]} | {axis.fixed} | {values} |"
        )
    return "\n".join([*lines, "", "![time by size](growth.png)", ""])


def plot(rows: list[dict[str, Any]], fitted: dict[str, dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.8), layout="constrained")
    for axis, panel in zip(AXES, panels, strict=True):
        found = [r for r in rows if r["axis"] == axis.name]
        scale = found[-1]["stock"] / found[-1]["flops"]
        exponents = fitted[axis.name]
        panel.plot(
            axis.sizes,
            [1e3 * scale * r["flops"] for r in found],
            "k:",
            label=f"flops, scaled: slope {exponents['flops']:.2f}",
        )
        for side, look in (
            ("stock", {"linewidth": 5, "alpha": 0.35}),
            ("ours", {"linewidth": 1.3}),
        ):
            times = [1e3 * r[side] for r in found]
            panel.plot(
                axis.sizes,
                times,
                "o-",
                color="C0",
                markersize=3,
                label=f"{side}: slope {exponents[side]:.2f}",
                **look,
            )
        panel.set(xscale="log", yscale="log", xlabel=axis.name, title=axis.fixed)
        panel.set_xticks(axis.sizes, axis.sizes)
        panel.minorticks_off()
        panel.legend(frameon=False)
    panels[0].set_ylabel("forward + backward, ms")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
