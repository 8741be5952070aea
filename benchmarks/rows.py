"""``python -m benchmarks.rows``: softmax and cross-entropy of rows from 1K to 256K elements on a
GPU, in bytes per second.

The bytes are the least possible: each input is read once, each output and gradient written once.
Writes ``benchmarks/results/rows-CARD.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_backprop import functional

from .measure import compare
from .report import RESULTS, card, machine_of

WIDTHS = tuple(2**k for k in range(10, 19))
ELEMENTS = 2**26


def calls(
    name: str, width: int, direction: str, function: Callable[..., Tensor]
) -> Callable[[], object]:
    """The op on ``ELEMENTS`` random elements in bfloat16, in rows of ``width``."""
    rows = ELEMENTS // width
    x = torch.randn(
        rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=direction != "forward"
    )
    if name == "cross_entropy":
        target = torch.randint(width, (rows,), device="cuda")
        if direction == "forward":
            return lambda: function(x, target)
        return lambda: torch.autograd.grad(function(x, target), x)
    dy = torch.randn_like(x)
    if direction == "forward":
        return lambda: function(x, -1)
    return lambda: torch.autograd.grad(function(x, -1), x, dy)


#: how many tensors must be read or written
TRAFFIC = {
    ("softmax", "forward"): 2, ("softmax", "forward+backward"): 5,
    ("log_softmax", "forward"): 2, ("log_softmax", "forward+backward"): 5,
    ("cross_entropy", "forward"): 1, ("cross_entropy", "forward+backward"): 2,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rows",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="for each ratio (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU, and none is visible")
    lines = [
        f"# Rows of bfloat16, {ELEMENTS // 2**20}M elements in total: TB/s ours / stock",
        "",
        "; ".join(f"{k}: {v}" for k, v in machine_of("cuda").items() if k != "dtype") + ".",
        "",
        "Counted are the fewest bytes possible: each input is read once, each output and gradient "
        "written once. GPU time of CUDA graphs. Written by `python -m benchmarks.rows`.",
        "",
        f"| op | {' | '.join(f'{w // 1024}K' for w in WIDTHS)} |",
        "|---" * (len(WIDTHS) + 1) + "|",
    ]
    for (name, direction), tensors in TRAFFIC.items():
        cells = []
        for width in WIDTHS:
            ours, stock = (calls(name, width, direction, getattr(m, name)) for m in (functional, F))
            result = compare(ours, stock, args.seconds, "cuda")
            traffic = 2 * ELEMENTS * tensors / 1e12
            cells.append(f"{traffic / result.ours:.2f} / {traffic / result.stock:.2f}")
        lines.append(f"| {name} {direction} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"rows-{card()}.md"
    file.write_text("\n".join([*lines, ""]))
    print(f"wrote {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
