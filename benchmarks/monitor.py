"""``python -m benchmarks.monitor``: what ``custom_backprop.monitor.GradientMonitor`` adds to a training step at its default interval.

Whole windows of steps, with the monitor and without it, in turns in one process, by the processor's time (on a GPU by the clock).
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
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    return model, _loss(model, torch.rand(128, 64, device=device))


def deep(device: str) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Twelve blocks of layer norm, 512 -> 1024 -> 512 and a way around, batch 128: 12.6 million weights in 72 tensors."""
    model = nn.Sequential(*(_Block(512) for _ in range(12)), nn.Linear(512, 10)).to(device)
    return model, _loss(model, torch.rand(128, 512, device=device))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _loss(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    target = torch.randint(0, 10, (len(x),), device=x.device)
    return lambda: nn.functional.cross_entropy(model(x), target)


def overhead(
    make: Callable[[str], tuple[nn.Module, Callable[[], torch.Tensor]]], device: str, windows: int
) -> tuple[float, float, float, float]:
    """Seconds of a step, and the parts of it that the monitor adds: median and quartiles over pairs of windows."""
    torch.manual_seed(0)
    model, loss = make(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    every = GradientMonitor(model).every
    clock = time.perf_counter if device == "cuda" else time.process_time

    def window(monitor: GradientMonitor | None) -> float:
        start = clock()
        for _ in range(every):
            optimizer.zero_grad()
            loss().backward()
            if monitor is not None:
                monitor.step()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / every

    with GradientMonitor(model) as monitor:
        window(monitor)
        steps, added = [], []
        for i in range(windows):
            if i % 2:
                watched, plain = window(monitor), window(None)
            else:
                plain, watched = window(None), window(monitor)
            steps.append(plain)
            added.append(watched / plain - 1)
    low, median, high = statistics.quantiles(added, n=4)
    return statistics.median(steps), low, median, high


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=30, help="pairs of windows, with and without (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, make, windows in (("digits", digits, args.windows), ("deep", deep, max(3, args.windows // 6))):
        step, low, median, high = overhead(make, args.device, windows)
        print(f"{name:8} step {step * 1e3:8.3f} ms, the monitor adds {median:+.2%} (quartiles {low:+.2%} to {high:+.2%})", flush=True)


if __name__ == "__main__":
    main()
