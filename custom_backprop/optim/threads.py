"""Updates small tensors with one thread.

ATen's fused kernels divide each tensor of a list among all threads, however small it is. To
synchronise the threads takes about 2 us per tensor, in which one of them alone could update a few
thousand elements.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[..., None]

#: a tensor with more elements is worth all threads (measured: 4096 for Adam, 6300 for SGD with
#: momentum, 10900 without)
SMALL = 2**12


def by_all_threads(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls one of ATen's kernels with all threads."""
    kernel(*args, **kwargs)


def by_one_thread(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls one of ATen's kernels with one thread. The setting belongs to the calling thread, so
    other Python threads are not affected."""
    threads = torch.get_num_threads()
    set_threads = openmp_setter()
    if set_threads is None or threads == 1:
        kernel(*args, **kwargs)
        return
    set_threads(1)
    try:
        kernel(*args, **kwargs)
    finally:
        set_threads(threads)


@functools.cache
def openmp_setter() -> Callable[[int], None] | None:
    """``omp_set_num_threads`` of the OpenMP that ATen itself uses, found through the library that
    is linked to it; None if ATen has other threads.

    (``torch.set_num_threads`` sets it for the whole process, and empties oneDNN's caches.)
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    set_threads: Any = getattr(ctypes.PyDLL(torch._C.__file__), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads.argtypes, set_threads.restype = [ctypes.c_int], None
    return set_threads
