"""``python -m benchmarks.report`` writes the table of ratios stock / ours, as Markdown, JSON and a
plot, to ``benchmarks/results/``.

On a CPU there are two tables. ``cpu`` uses the default allocator, as users do, so new memory costs
page faults. ``cpu-kept``, by ``--allocator kept``, reuses freed memory and so shows the arithmetic
alone. With ``--busy N`` as many other processes compute all the while: ``cpu-busy``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import custom_backprop
from custom_backprop.cli.progress import progress
from custom_backprop.testing import OpSpec, peak_memory
from custom_backprop.testing.database import named

from .cases import DIRECTIONS, HUGE, SIZES, pair
from .measure import Prepare, busy, compare, reuse_freed_memory
from .plots import heat_map
from .training import HIDDEN, training_step

RESULTS = Path(__file__).parent / "results"

ABOUT = """Ours and stock take turns in one process. Each ratio is the median over the pairs.
Memory: peak of forward + backward at the {largest} size, with the incoming gradient, without the
inputs. Written by `python -m benchmarks.report`."""

ON_A_GPU = """
Small: calls one after the other, until the GPU has finished them, so the host's time counts. Other
sizes: the GPU's own time, of CUDA graphs. Medium and large inputs are in the L2 cache, as they are
after the layer before. Huge inputs are bfloat16 and larger than the cache; in parentheses the time
of ours in us."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="an op; or a family, for all its ops, unless an op has its name; default: all",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=(*SIZES, HUGE),
        help="default: all; without a GPU, all but the last",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each ratio")
    parser.add_argument(
        "--allocator",
        choices=("default", "kept"),
        default="default",
        help="on a CPU: the default one, or one that reuses freed memory",
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="other processes that compute meanwhile"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    try:
        specs = named(args.ops)
    except ValueError as error:
        parser.error(str(error))
    sizes = args.sizes or (SIZES if args.device == "cpu" else (*SIZES, HUGE))
    reused = args.device == "cpu" and args.allocator == "kept" and reuse_freed_memory()
    rows: list[dict[str, Any]] = []
    with (
        busy(args.busy),
        progress(len(specs) * len(sizes) * len(DIRECTIONS) + len(HIDDEN), "ratio") as bar,
    ):
        for spec in specs:
            for size in sizes:
                for direction in DIRECTIONS:
                    bar.set_postfix_str(f"{spec.name} {size}")
                    rows.append(_row(spec, size, direction, args.device, args.seconds))
                    bar.update()
        for hidden in HIDDEN:
            bar.set_postfix_str("digits training step")
            rows.append(_training(args.device, hidden, args.seconds * 5))
            bar.update()
    name = f"cpu{'-kept' * reused}" if args.device == "cpu" else card()
    name += "-busy" * bool(args.busy)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(args.device)
    if args.busy:
        machine["other processes"] = args.busy
    if reused:
        machine["allocator"] = (
            "the C library's, reusing freed memory (no page faults after the first call)"
        )
    (args.out / f"{name}.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    )
    (args.out / f"{name}.md").write_text(_markdown(machine, rows, name))
    draw(rows, args.out / f"{name}.png")
    print(_markdown(machine, rows, name))
    print(
        f"wrote {', '.join(str(args.out / f'{name}.{kind}') for kind in ('json', 'md', 'png'))}",
        file=sys.stderr,
    )
    return int(any("error" in r for r in rows))


def _row(spec: OpSpec, size: str, direction: str, device: str, seconds: float) -> dict[str, Any]:
    row = {"op": spec.name, "family": spec.family, "size": size, "direction": direction}
    try:
        return row | _measured(spec, size, direction, device, seconds)
    except RuntimeError as error:  # such as out of memory, hours after the first row
        print(f"{spec.name} {size} {direction}: {error}", file=sys.stderr)
        return row | {"error": str(error)}


def _measured(
    spec: OpSpec, size: str, direction: str, device: str, seconds: float
) -> dict[str, Any]:
    calls = pair(spec, size, direction, device)
    row = asdict(
        compare(calls.ours, calls.stock, seconds, device, calls.prepare, host=size == "small")
    )
    if size in ("large", HUGE) and direction == "forward+backward":
        for name, call in (("ours_bytes", calls.ours), ("stock_bytes", calls.stock)):
            row[name] = peak_memory(partial(_prepared, call, calls.prepare), device)
    return row


def _prepared(call: Callable[..., Any], prepare: Prepare) -> Any:
    return call(*prepare())


def _training(device: str, hidden: tuple[int, int], seconds: float) -> dict[str, Any]:
    result = compare(
        training_step(True, device, hidden),
        training_step(False, device, hidden),
        seconds,
        device,
        host=True,
    )
    size = " -> ".join(map(str, (64, *hidden, 10)))
    return {
        "op": "digits training step",
        "family": "training",
        "size": size,
        "direction": "step",
    } | asdict(result)


def card() -> str:
    """The GPU's name, as used in names of files."""
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def machine_of(device: str) -> dict[str, Any]:
    return {
        "processor": torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "custom_backprop": custom_backprop.__version__,
        "dtype": "float32",
        "allocator": "PyTorch's caching allocator"
        if device == "cuda"
        else "the C library's default (page faults included)",
    }


def _markdown(machine: dict[str, Any], rows: list[dict[str, Any]], name: str) -> str:
    by = {(r["op"], r["size"], r["direction"]): r for r in rows}
    sizes = [s for s in (*SIZES, HUGE) if any(r["size"] == s for r in rows)]
    largest = sizes[-1]
    lines = [
        f"# Stock / ours on {name}: above 1 ours is faster",
        "",
        "; ".join(f"{k}: {v}" for k, v in machine.items()) + ".",
        "",
        ABOUT.format(largest=largest),
        *([ON_A_GPU] if HUGE in sizes else []),
        "",
        "| op | "
        + " | ".join(f"{s} {d}" for s in sizes for d in DIRECTIONS)
        + " | memory ours / stock, MiB |",
        "|---" * (len(sizes) * len(DIRECTIONS) + 2) + "|",
    ]
    for op in dict.fromkeys(r["op"] for r in rows if r["family"] != "training"):
        cells = [_cell(by.get((op, s, d))) for s in sizes for d in DIRECTIONS]
        last = by.get((op, largest, "forward+backward"), {})
        memory = (
            f"{last['ours_bytes'] / 2**20:.1f} / {last['stock_bytes'] / 2**20:.1f}"
            if "ours_bytes" in last
            else ""
        )
        lines.append(f"| {op} | " + " | ".join(cells) + f" | {memory} |")
    lines.append("")
    for r in (r for r in rows if r["family"] == "training"):
        quartiles = f"quartiles {r['low']:.2f} to {r['high']:.2f}"
        lines.append(f"{r['op']} ({r['size']}): {r['ratio']:.2f} ({quartiles})")
    lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "failed"
    return f"{row['ratio']:.2f}" + (f" ({row['ours'] * 1e6:.0f} us)" if row["size"] == HUGE else "")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A heat map of the ratios, and of the memory of stock over that of ours."""
    rows = [r for r in rows if r["family"] != "training" and "error" not in r]
    sizes = [s for s in (*SIZES, HUGE) if any(r["size"] == s for r in rows)]
    ratios = {(r["op"], f"{r['size']} {r['direction']}"): r["ratio"] for r in rows}
    ratios |= {(r["op"], "memory"): r["stock_bytes"] / r["ours_bytes"] for r in last(rows)}
    heat_map(
        list(dict.fromkeys(r["op"] for r in rows)),
        [*(f"{s} {d}" for s in sizes for d in DIRECTIONS), "memory"],
        ratios,
        f"Stock / ours on {file.stem}: above 1 ours is better",
        file,
    )


def last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward + backward at the largest size, of which the memory was measured."""
    largest = [s for s in (*SIZES, HUGE) if any(r["size"] == s for r in rows)][-1]
    return [r for r in rows if r["size"] == largest and r.get("ours_bytes")]


if __name__ == "__main__":
    sys.exit(main())
