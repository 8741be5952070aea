"""``python -m benchmarks.monitor``: what ``custom_backprop.monitor.GradientMonitor`` adds to a
training step at its default interval.

The monitor measures one step in ``every``, and the difference between windows would be lost in the
noise. So here it measures every step, and these take turns with plain steps. Both are timed in CPU
time (on a GPU by the clock). The difference is divided by ``every``. The cost of a step that is
only counted, timed alone, is added.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from custom_backprop.monitor import GradientMonitor


def digits(device: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """64 -> 256 -> 128 -> 10, batch 128, as in ``benchmarks.training``."""
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ).to(device)
    return model, _loss(model, torch.rand(128, 64, device=device))


def deep(device: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Twelve blocks of layer norm, 512 -> 1024 -> 512 and a skip connection, batch 128: 12.6
    million weights in 72 tensors."""
    model = nn.Sequential(*(_Block(512) for _ in range(12)), nn.Linear(512, 10)).to(device)
    return model, _loss(model, torch.rand(128, 512, device=device))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _loss(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    target = torch.randint(0, 10, (len(x),), device=x.device)
    return lambda: nn.functional.cross_entropy(model(x), target)


def overhead(
    make: Callable[[str], tuple[nn.Module, Callable[[], torch.Tensor]]], device: str, pairs: int
) -> tuple[float, ...]:
    """Seconds of a plain step; then what a measured step adds, and what the monitor adds at its
    default interval, both as a fraction of a plain step."""
    torch.manual_seed(0)
    model, loss = make(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    clock = time.perf_counter if device == "cuda" else time.process_time

    def steps(monitor: GradientMonitor | None) -> float:
        start = clock()
        for _ in range(12):
            optimizer.zero_grad()
            loss().backward()
            if monitor is not None:
                monitor.step()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / 12

    plain, watched = [], []
    for i in range(pairs + 1):
        with GradientMonitor(model, every=1) as monitor:
            watched.append(steps(monitor))
        plain.append(steps(None))
        if i == 0:
            plain, watched = [], []  # the first ones warm up
    step = statistics.median(plain)
    measured = statistics.median(w / p - 1 for w, p in zip(watched, plain, strict=True))
    idle = GradientMonitor(model, every=10**9)
    start = clock()
    for _ in range(10_000):
        idle.step()
    counted = (clock() - start) / 10_000
    return step, measured, measured / GradientMonitor(model).every + counted / step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pairs",
        type=int,
        default=60,
        help="pairs of turns, with and without (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, make, pairs in (
        ("digits", digits, args.pairs),
        ("deep", deep, max(3, args.pairs // 10)),
    ):
        step, measured, added = overhead(make, args.device, pairs)
        print(
            f"{name:8} step {step * 1e3:8.3f} ms; a measured step adds {measured:.0%}; "
            f"at the default interval {added:.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
