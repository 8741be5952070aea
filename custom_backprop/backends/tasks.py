"""Chunks of an op on a CPU, shared out among threads that each compute with one thread.

ATen divides every call among all threads and waits for the last of them. In a walk of ten calls a
chunk that is ten waits a chunk, and on a busy machine one wait lasts until the system runs a thread
again that it has put aside: 8 ms where there is one process too many. Here threads share the
chunks, not the calls, and wait once, at the end. ATen's calls release the interpreter's lock, so
the threads do run at once.

Whoever is free takes the next chunk. Chunks must follow from shapes alone: then the bits depend
neither on the number of threads nor on who was free. Short walks are not shared: there ATen divides
the calls, and a sum over a chunk may depend on the number of threads, as stock's does.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, repeat
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..formulas.precision import HALF
from .selection import is_plain

#: what a thread's work leaves there, it finds again at its next chunk; at first nothing
Memory = list[Tensor]

#: elements of a chunk: 1 MiB of float32, beside which the cost of the calls is small
CHUNK = 2**18

#: up to so many elements are one chunk, whose calls ATen divides. For some milliseconds after a
#: call its threads look out for the next one, and would share the processors with ours
WHOLE = 2**22

#: fewer chunks than these are done within that time, too: the caller walks them
FEWEST = 32


def chunk_of(x: Tensor) -> int:
    """Elements of a chunk of x. What is computed in float32 for half precision is a copy, so that
    never all of it is one."""
    return x.numel() if x.numel() <= WHOLE and x.dtype not in HALF else CHUNK


def each(
    device: torch.device, work: Callable[[Any, Memory], Any], chunks: Iterable[Any]
) -> list[Any]:
    """``work(chunk, memory)`` of each chunk of tensors on ``device``, in their order.

    Chunks are taken in their order, one at a time, also from a generator. The calling thread walks
    alone, and ATen divides the calls as ever, where there are few chunks; where there is one
    thread, as in a walk inside another; where somebody watches, because modes and profilers watch
    their own thread only; and on a GPU, whose current stream is a thread's own.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, FEWEST))
    chunks = chain(first, chunks)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if len(first) < FEWEST or threads == 1 or openmp_setter() is None or _is_watched():
        memory: Memory = []
        return [work(chunk, memory) for chunk in chunks]
    return _Walk(work, chunks).by(threads)


def scratch(
    memory: Memory, like: Tensor, count: int = 1, dtype: torch.dtype | None = None
) -> Memory:
    """``count`` tensors, made for the first chunk, which no later one exceeds."""
    if not memory:
        memory.extend(torch.empty_like(like, dtype=dtype) for _ in range(count))
    return [t if t.shape == like.shape else t[: len(like)] for t in memory]


def cut(size: int, x: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """The tensors, all of the shape of x, cut alike into chunks of about ``size`` elements; beside
    them numbers (0-D) and None stay whole."""
    tensors, n = (x, *others), x.numel()
    if n <= size:
        return (tensors,)
    shaped = [t for t in tensors if t is not None and t.dim()]
    flat = all(t.is_contiguous() for t in shaped)
    step = size if flat else max(1, size * x.shape[0] // n)
    parts = (
        repeat(t) if t is None or not t.dim() else (t.view(-1) if flat else t).split(step)
        for t in tensors
    )
    return zip(*parts, strict=False)


class _Walk:
    """One call of :func:`each`."""

    def __init__(self, work: Callable[[Any, Memory], Any], chunks: Iterator[Any]) -> None:
        self.work, self.chunks, self.lock = work, enumerate(chunks), Lock()
        self.results: dict[int, Any] = {}
        self.inference = torch.is_inference_mode_enabled()

    def by(self, threads: int) -> list[Any]:
        helpers = _helpers(self.helped, threads - 1)
        try:
            with one_thread():
                self.walk()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]
            errors = [helper.exception() for helper in begun]  # which waits for it
            results = [self.results[i] for i in sorted(self.results)]
            self.__dict__.clear()  # a helper that has not begun still refers to it
        for error in filter(None, errors):
            raise error
        return results

    def walk(self) -> None:
        memory: Memory = []
        try:
            while (found := self.next()) is not None:
                i, chunk = found
                self.results[i] = self.work(chunk, memory)
        except BaseException:
            self.chunks = enumerate(())  # nobody begins another
            raise

    def next(self) -> tuple[int, Any] | None:
        with self.lock:
            return next(self.chunks, None)

    def helped(self) -> None:
        """The walk of a thread that is not the caller's."""
        with torch.inference_mode(self.inference), torch.no_grad(), one_thread():
            self.walk()


def _is_watched() -> bool:
    return not is_plain(()) or torch.autograd._profiler_enabled()


def _helpers(run: Callable[[], None], count: int) -> list[Future[None]]:
    """Each runs ``run`` as soon as a thread is free; fewer while the interpreter shuts down, or
    where the system gives no more threads."""
    helpers: list[Future[None]] = []
    pool = _pool()
    try:
        for _ in range(count):
            helpers.append(pool.submit(run))
    except RuntimeError:  # the last one may wait in the pool all the same
        pool.shutdown(wait=False, cancel_futures=True)
        _pool.cache_clear()
    return helpers


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """It begins a thread when one is wanted and none is idle."""
    return ThreadPoolExecutor(os.cpu_count(), "custom_backprop")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads


class one_thread:
    """In its block the calling thread computes alone; other threads are not affected."""

    def __enter__(self) -> None:
        # asked first, because a thread's first question to ATen sets the number
        self._threads, set_threads = torch.get_num_threads(), openmp_setter()
        if set_threads is not None:
            set_threads(1)
        self._mkl = _mkl_setter()(1)

    def __exit__(self, *exception: object) -> None:
        set_threads = openmp_setter()
        if set_threads is not None:
            set_threads(self._threads)
        _mkl_setter()(self._mkl)


@functools.cache
def openmp_setter() -> Callable[[int], None] | None:
    """``omp_set_num_threads`` of the OpenMP that ATen itself uses, found through the library that
    is linked to it; None if ATen has other threads. The setting belongs to the calling thread.

    (``torch.set_num_threads`` sets it for the whole process, and empties oneDNN's caches.)
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    set_threads: Any = getattr(ctypes.PyDLL(torch._C.__file__), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads.argtypes, set_threads.restype = [ctypes.c_int], None
    return set_threads


@functools.cache
def _mkl_setter() -> Callable[[int], int]:
    """Sets the calling thread's number for MKL, which asks OpenMP only until somebody calls
    ``torch.set_num_threads``; returns the one before, 0 for none."""
    setter: Any = getattr(ctypes.PyDLL(torch._C.__file__), "MKL_Set_Num_Threads_Local", None)
    if setter is None:
        return lambda threads: 0
    setter.argtypes = [ctypes.c_int]
    return setter
