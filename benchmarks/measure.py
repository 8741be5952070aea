"""Ratios, not times: both calls take turns in one process, so if the machine becomes slower, both
do."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Prepare = Callable[[], tuple[Any, ...]]
#: number of calls -> seconds per call
Timer = Callable[[int], float]


@dataclass(frozen=True)
class Comparison:
    """Seconds per call (medians), and the ratio stock / ours: the median over the pairs, and the
    quartiles. Above 1 ours is faster."""

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
    """Times both for about ``seconds`` in total, in at least seven pairs. Each turn of a pair is
    long enough for the clock.

    ``prepare`` makes the arguments of each call; this is not timed. On a GPU it is the time of a
    CUDA graph, without the host's. With ``host``, and if a call waits for the GPU, it is the time
    until all of several calls in a row have run.
    """
    both = ours, stock
    if device != "cuda" or host or any(waits(call, prepare) for call in both):
        timers: list[Timer] = [clock(call, device, prepare) for call in both]
    else:
        timers = [Recorded(call, prepare) for call in both]
    once = max(timer(3) for timer in timers)
    calls = max(1, int(2e-3 / once))
    return comparison(
        *take_turns(timers, max(7, min(2000, int(seconds / (2 * calls * once)))), calls)
    )


def take_turns(timers: Sequence[Timer], rounds: int, calls: int = 1) -> list[list[float]]:
    """Seconds per call of each timer, by round. Every other round is in reverse order."""
    times: list[list[float]] = [[] for _ in timers]
    turns = list(zip(times, timers, strict=True))
    for i in range(rounds):
        for found, timer in turns if i % 2 else turns[::-1]:
            found.append(timer(calls))
    return times


def comparison(ours: Sequence[float], stock: Sequence[float]) -> Comparison:
    """Of seconds per call, by round."""
    ratios = sorted(s / o for o, s in zip(ours, stock, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return Comparison(
        statistics.median(ours), statistics.median(stock), statistics.median(ratios), low, high
    )


def clock(call: Callable[..., Any], device: str, prepare: Prepare = tuple) -> Timer:
    """Times calls by the clock; on a GPU until it has finished all of them."""
    return partial(_finished if device == "cuda" else _clocked, call, prepare)


@contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """In its block as many other processes compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def reuse_freed_memory() -> bool:
    """Makes the C library reuse freed memory, as PyTorch's allocator on a GPU does. Returns False
    if it is not glibc.

    By default glibc sometimes returns a large block to the system, depending on what else is in the
    heap at that moment. A call whose blocks are returned has page faults again, which take several
    times as long as the arithmetic. The ratio then depends on chance.
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
    """The same, until the GPU has finished."""
    given = [prepare() for _ in range(calls)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for args in given:
        call(*args)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def waits(call: Callable[..., Any], prepare: Prepare) -> bool:
    """Whether the host waits for the GPU, as in stock's gaussian_nll_loss. Such a call cannot be
    recorded, and the attempt would break torch's random number generator."""
    call(*prepare())
    given = prepare()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*given)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Recorded:
    """Times a CUDA graph by events. The graph has many calls if they are short. Inputs of a few
    megabytes are then in the L2 cache.

    ``prepare`` runs on the stream that is recorded, as a backward pass runs on the stream of its
    forward pass.
    """

    def __init__(self, call: Callable[..., Any], prepare: Prepare = tuple) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*prepare())
            self._count = max(1, min(20, int(1e-3 / _finished(call, prepare, 3))))
            given = [prepare() for _ in range(self._count)]
        torch.cuda.current_stream().wait_stream(stream)
        # every replay reads these, and a call may empty a list that it is given
        self._read = [list(a) if isinstance(a, list) else a for args in given for a in args]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for args in given:
                call(*args)

    def __call__(self, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = max(1, calls // self._count)
        self._graph.replay()  # so that the GPU is busy at the first event
        start.record()
        for _ in range(times):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (times * self._count)
