"""Ratios, not times: both calls in turns in one process, so that the machine's drift meets both
alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Prepare = Callable[[], tuple[Any, ...]]
#: calls -> seconds a call
Timer = Callable[[int], float]


@dataclass(frozen=True)
class Comparison:
    """Seconds a call (medians), and the ratio stock / ours: the median, and the quartiles, over the
    pairs. Above 1 we win."""

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
    prepare: Prepare = tuple,
    host: bool = False,
) -> Comparison:
    """Times both for about ``seconds`` in all, at least seven pairs, each turn of a pair long
    enough for the clock.

    ``prepare`` makes the arguments of each call, outside of what is timed. On a GPU the device's
    time is taken, of recorded calls, which the host has no part in; with ``host``, and where a call
    waits for the GPU, the time until calls made one after the other have all run.
    """
    both = ours, stock
    if device != "cuda":
        timers: list[Timer] = [partial(_clocked, call, prepare) for call in both]
    elif host or any(waits(call, prepare) for call in both):
        timers = [partial(_finished, call, prepare) for call in both]
    else:
        timers = [Recorded(call, prepare) for call in both]
    once = max(timer(3) for timer in timers)
    calls = max(1, int(2e-3 / once))
    pairs = max(7, min(2000, int(seconds / (2 * calls * once))))
    mine: list[float] = []
    theirs: list[float] = []
    turns = [(mine, timers[0]), (theirs, timers[1])]
    for i in range(pairs):
        for times, timer in turns if i % 2 else turns[::-1]:
            times.append(timer(calls))
    ratios = sorted(t / m for m, t in zip(mine, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return Comparison(
        statistics.median(mine), statistics.median(theirs), statistics.median(ratios), low, high
    )


def reuse_freed_memory() -> bool:
    """Makes the C library reuse what is freed, as PyTorch's allocator on a GPU does; False where it
    is not glibc.

    By default glibc returns a large block to the system, or does not, depending on what else lies
    in the heap at that moment. A call whose blocks are returned pays for each page again, several
    times the arithmetic: the ratio then tells whose luck that was.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None
        and bool(mallopt(trim_threshold, 2**31 - 1))
        and bool(mallopt(mmap_max, 0))
    )


def _clocked(call: Callable[..., Any], prepare: Prepare, calls: int) -> float:
    given = [prepare() for _ in range(calls)]
    start = time.perf_counter()
    for args in given:
        call(*args)
    return (time.perf_counter() - start) / calls


def _finished(call: Callable[..., Any], prepare: Prepare, calls: int) -> float:
    """The same until the GPU has finished them."""
    given = [prepare() for _ in range(calls)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for args in given:
        call(*args)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def waits(call: Callable[..., Any], prepare: Prepare) -> bool:
    """Whether the host waits for the GPU, as in stock's gaussian_nll_loss. Such a call cannot be
    recorded, and the attempt would leave torch's random numbers unusable."""
    call(*prepare())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*prepare())
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Recorded:
    """A timer of a CUDA graph, by events: many calls in it if they are short. Inputs of a few
    megabytes are still in the L2 cache."""

    def __init__(self, call: Callable[..., Any], prepare: Prepare = tuple) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*prepare())
            self._count = max(1, min(20, int(1e-3 / _finished(call, prepare, 3))))
        torch.cuda.current_stream().wait_stream(stream)
        given = [prepare() for _ in range(self._count)]
        # the graph reads these again; a call may empty a list that it is given
        self._read = [list(a) if isinstance(a, list) else a for args in given for a in args]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for args in given:
                call(*args)

    def __call__(self, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = max(1, calls // self._count)
        self._graph.replay()  # the first event then meets a GPU at work
        start.record()
        for _ in range(times):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (times * self._count)
