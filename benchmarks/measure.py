"""Ratios, not times: both calls in turns in one process, so that the machine's drift meets both alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Comparison:
    """Seconds a call (medians), and the ratio stock / ours: the median, and the quartiles, over the pairs. Above 1 we win."""

    ours: float
    stock: float
    ratio: float
    low: float
    high: float


def compare(
    ours: Callable[..., Any],
    stock: Callable[..., Any],
    seconds: float = 1.0,
    device: str = "cpu",
    prepare: Callable[[], tuple[Any, ...]] = tuple,
) -> Comparison:
    """Times both for about ``seconds`` in all, at least seven pairs, each turn of a pair long enough for the clock.

    ``prepare`` makes the arguments of each call, outside of what is timed.
    """
    timer = cuda_seconds if device == "cuda" else _cpu_seconds
    once = max(timer(stock, 3, prepare), timer(ours, 3, prepare))
    calls = max(1, int(2e-3 / once))
    pairs = max(7, min(2000, int(seconds / (2 * calls * once))))
    mine, theirs = [], []
    for i in range(pairs):
        turns = ((mine, ours), (theirs, stock)) if i % 2 else ((theirs, stock), (mine, ours))
        for times, call in turns:
            times.append(timer(call, calls, prepare))
    ratios = sorted(t / m for m, t in zip(mine, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return Comparison(statistics.median(mine), statistics.median(theirs), statistics.median(ratios), low, high)


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed, as PyTorch's allocator on a GPU does; False where it is not glibc.

    By default glibc returns a large block to the system or keeps it depending on what else lies in the heap at that moment. A call whose
    blocks are returned pays for each page again, several times the arithmetic: the ratio then tells whose luck that was.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def _cpu_seconds(call: Callable[..., Any], calls: int, prepare: Callable[[], tuple[Any, ...]]) -> float:
    given = [prepare() for _ in range(calls)]
    start = time.perf_counter()
    for args in given:
        call(*args)
    return (time.perf_counter() - start) / calls


def cuda_seconds(call: Callable[..., Any], calls: int, prepare: Callable[[], tuple[Any, ...]] = tuple) -> float:
    """By events, the L2 cache overwritten before each call."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    total = 0.0
    for _ in range(calls):
        args = prepare()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*args)
        end.record()
        end.synchronize()
        total += start.elapsed_time(end) * 1e-3
    return total / calls
