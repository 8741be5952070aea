"""``python -m benchmarks.models``: training steps of whole models, stock and after
``custom_backprop.convert``, eager and compiled.

It writes a table, a plot and the figures to ``benchmarks/results/models-cpu.{md,png,json}``, or
under the name of the GPU, again after each model: an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import custom_backprop
from custom_backprop.cli.progress import progress
from custom_backprop.testing import peak_memory

from .measure import clock, comparison, take_turns
from .networks import LARGE, MEDIUM, NETWORKS, QUICK, Network, Size
from .report import RESULTS, card, machine_of

#: whether converted, whether compiled
SIDES = {
    "stock": (False, False),
    "converted": (True, False),
    "stock compiled": (False, True),
    "converted compiled": (True, True),
}
#: of which the losses are compared. The first one compiles
STEPS = 5

ABOUT = """Each step is forward, backward and a step of torch's fused AdamW. All sides start with
the same weights and take the same batches of random data. Then they take turns in one process; the
time of compilation does not count. In parentheses stand ratios to stock, of eager to eager and
compiled to compiled: for speed the median over the rounds, where above 1 converted is faster.
Memory: peak of a step's tensors, beyond the weights and the optimizer's states. Losses: the largest
difference to stock's in the first {steps} steps, relative. Written by `python -m
benchmarks.models`."""


class Trained:
    """A model in training."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: dict[str, Tensor] | None = None) -> float:
        """Returns the loss."""
        output = self.model(**(batch or self.batch))
        loss = output if isinstance(output, Tensor) else output.loss
        del output  # it refers to the logits
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measured(
    name: str,
    size: Size,
    device: str,
    seconds: float,
    sides: Sequence[str],
    tell: Callable[[str], None],
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """The rows of a network, one for each side: all in turns for about ``seconds`` each. ``tell``
    is called with the name of each part of the work before it begins. ``backend`` compiles."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build(size).to(device, _dtype(device)).train()
    batches = [_batch(network, size, device, seed) for seed in range(STEPS)]
    rows: dict[str, dict[str, Any]] = {}
    trained: dict[str, Trained] = {}
    losses: dict[str, list[float]] = {}
    parameters = sum(p.numel() for p in model.parameters())
    for side in sides:
        converted, compiled = SIDES[side]
        tell(side)
        rows[side] = {"network": name, "side": side, "parameters": parameters, "unit": network.unit}
        try:
            twin = copy.deepcopy(model)
            twin = custom_backprop.convert(twin) if converted else twin
            if compiled:
                twin.compile(backend=backend)
            run = Trained(twin, batches[0])
            losses[side] = [run.step(batch) for batch in batches]
            trained[side] = run
        except Exception as error:  # a compiler's too: the other sides are measured
            print(f"{name} {side}: {error}", file=sys.stderr)
            rows[side]["error"] = str(error)
    if not trained:
        return list(rows.values())
    tell("in turns")
    timers = [clock(run.step, device) for run in trained.values()]
    rounds = max(7, int(seconds / max(timer(1) for timer in timers)))
    times = dict(zip(trained, take_turns(timers, rounds), strict=True))
    for side, run in trained.items():
        stock = "stock compiled" if side.endswith("compiled") else "stock"
        if stock in times:
            rows[side] |= asdict(comparison(times[side], times[stock]))
        if "stock" in losses:
            pairs = zip(losses[side], losses["stock"], strict=True)
            rows[side]["difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        rows[side]["per_second"] = network.count(size) / statistics.median(times[side])
        rows[side]["peak_bytes"] = peak_memory(run.step, device)
    return list(rows.values())


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _batch(network: Network, size: Size, device: str, seed: int) -> dict[str, Tensor]:
    batch = network.batch(size, torch.Generator().manual_seed(seed))
    dtype = _dtype(device)
    return {k: t.to(device, dtype if t.is_floating_point() else None) for k, t in batch.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(NETWORKS)}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="for each model and side; default: %(default)s"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and no compilation, to see that it runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NETWORKS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(NETWORKS)}")
    names, skipped = args.names or list(NETWORKS), ""
    if missing := [n for n in names if importlib.util.find_spec(NETWORKS[n].library) is None]:
        skipped = f"skipped: {', '.join(missing)}, which need `pip install 'custom_backprop[hf]'`"
        print(skipped, file=sys.stderr)
    if not (names := [n for n in names if n not in missing]):
        return 1
    sides = [side for side, (_, compiled) in SIDES.items() if not (args.quick and compiled)]
    size = QUICK if args.quick else LARGE if args.device == "cuda" else MEDIUM
    seconds = 0.0 if args.quick else args.seconds
    machine = machine_of(args.device) | {"dtype": str(_dtype(args.device)).removeprefix("torch.")}
    machine |= {"size": " ".join(f"{k} {v}" for k, v in asdict(size).items())}
    file = args.out / f"models-{'cpu' if args.device == 'cpu' else card()}"
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with progress(len(names), "model") as bar:
        for name in names:
            tell = partial(_tell, bar, name)
            try:
                rows += measured(name, size, args.device, seconds, sides, tell)
            except KeyboardInterrupt:
                print(f"\ninterrupted: {file}.* have the models before {name}", file=sys.stderr)
                return 130
            torch.compiler.reset()
            page = markdown(machine, rows, skipped, file.name)
            file.with_suffix(".json").write_text(
                json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
            )
            file.with_suffix(".md").write_text(page)
            plot(rows, file.with_suffix(".png"))
            bar.update()
    print(page)
    print(
        f"wrote {', '.join(str(file.with_suffix(s)) for s in ('.json', '.md', '.png'))}",
        file=sys.stderr,
    )
    return int(any("error" in r for r in rows))


def _tell(bar: Any, name: str, part: str) -> None:
    bar.set_postfix_str(f"{name} {part}")


def markdown(machine: dict[str, Any], rows: list[dict[str, Any]], skipped: str, name: str) -> str:
    sides = list(dict.fromkeys(r["side"] for r in rows))
    by = {(r["network"], r["side"]): r for r in rows}
    lines = [
        "# Training whole models, stock and converted",
        "",
        "; ".join(f"{k}: {v}" for k, v in machine.items()) + ".",
        "",
        ABOUT.format(steps=STEPS),
        *(["", skipped] if skipped else []),
    ]
    for title, cell in CELLS.items():
        lines += ["", f"| {title} | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
        for network in dict.fromkeys(r["network"] for r in rows):
            found = [by[network, side] for side in sides]
            cells = ["failed" if "error" in r else cell(r, _stock(by, r)) for r in found]
            millions = f"{found[0]['parameters'] / 1e6:.3g}M"
            lines.append(
                f"| {network}, {millions}, {found[0]['unit']} | " + " | ".join(cells) + " |"
            )
    return "\n".join([*lines, "", f"![speed and memory]({name}.png)", ""])


def _stock(by: dict[tuple[str, str], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    """What a row is compared to; None if it is stock's or that one failed."""
    stock = by[row["network"], row["side"].replace("converted", "stock")]
    return None if stock is row or "error" in stock else stock


def _speed(row: dict[str, Any], stock: dict[str, Any] | None) -> str:
    return f"{row['per_second']:.0f}" + (f" ({row['ratio']:.2f})" if stock else "")


def _memory(row: dict[str, Any], stock: dict[str, Any] | None) -> str:
    share = f" ({row['peak_bytes'] / stock['peak_bytes']:.2f})" if stock else ""
    return f"{row['peak_bytes'] / 2**20:.1f}" + share


def _loss(row: dict[str, Any], stock: dict[str, Any] | None) -> str:
    return f"{row['difference']:.1e}" if row["side"] != "stock" and "difference" in row else ""


#: the tables: a title, and what a cell says
CELLS: dict[str, Callable[[dict[str, Any], dict[str, Any] | None], str]] = {
    "in a second": _speed,
    "peak memory, MiB": _memory,
    "losses differ by": _loss,
}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Speed and memory relative to stock, eager."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(r["network"] for r in rows))
    sides = list(dict.fromkeys(r["side"] for r in rows))
    found = {(r["network"], r["side"]): r for r in rows if "error" not in r}
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    width = 0.8 / len(sides)
    for panel, key, title in zip(
        panels, ("per_second", "peak_bytes"), ("speed", "peak memory"), strict=True
    ):
        for i, side in enumerate(sides):
            heights = [
                found[n, side][key] / found[n, "stock"][key]
                if {(n, side), (n, "stock")} <= found.keys()
                else 0.0
                for n in networks
            ]
            places = [k + width * (i - (len(sides) - 1) / 2) for k in range(len(networks))]
            panel.bar(places, heights, width, label=side, color=COLORS[side])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(networks)), networks)
        panel.set_title(f"{title}, relative to stock's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(sides), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


COLORS = {
    "stock": "0.75",
    "converted": "C0",
    "stock compiled": "0.55",
    "converted compiled": "C1",
}

if __name__ == "__main__":
    sys.exit(main())
