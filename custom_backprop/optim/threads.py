"""Updates small tensors with one thread.

ATen's fused kernels divide each tensor of a list among all threads, however small it is. To
synchronise the threads takes about 2 us per tensor, in which one of them alone could update a few
thousand elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends.tasks import one_thread, openmp_setter

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


def operators_by_one_thread(update: Callable[..., Any], *args: Any) -> None:
    """Calls a function of several operators, which one thread computes. Some of them are MKL's,
    such as a square root, and would divide their elements whatever OpenMP is told."""
    with one_thread():
        update(*args)
