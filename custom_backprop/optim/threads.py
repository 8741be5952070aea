"""Small tensors without threads.

ATen's fused kernels walk through a list of tensors and share out each of them to all threads,
however small. For the threads to meet again takes some 2 us a tensor: as long as one of them takes
for a few thousand elements by itself.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[..., None]

#: a tensor of more elements is worth sharing out (measured: 4096 of Adam, 6300 of SGD with
#: momentum, 10900 without)
SMALL = 2**12


def by_all_threads(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls one of ATen's kernels."""
    kernel(*args, **kwargs)


def by_one_thread(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls one of ATen's kernels so that it shares nothing out. Other threads of Python's see no
    change: the setting is the calling thread's own."""
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
    """``omp_set_num_threads`` of the OpenMP that ATen itself asks, found through the library that
    is linked to it; None where ATen has other threads.

    (``torch.set_num_threads`` sets it for the whole process, and empties oneDNN's caches.)
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    set_threads: Any = getattr(ctypes.PyDLL(torch._C.__file__), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads.argtypes, set_threads.restype = [ctypes.c_int], None
    return set_threads
