"""Whether anybody looks at an optimizer's steps.

torch.optim wraps ``step`` and ``zero_grad``, so that hooks run and a profiler sees each call by its
name. That takes 30 to 50 us even where there is neither, as long as the step of a small network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer


def callback_query() -> Callable[[], bool] | None:
    """``at::hasCallbacks``: whether anybody is called for what runs on this thread. That may be a
    profiler of Python's, one that was started from outside of it, or an execution trace. None where
    the library does not show it."""
    found = getattr(ctypes.PyDLL(torch._C.__file__), "_ZN2at12hasCallbacksEv", None)
    if found is not None:
        found.argtypes, found.restype = [], ctypes.c_bool
    return found


def maybe_profiled() -> bool:
    """The same, as far as Python knows. (Where there is a GPU, somebody outside of Python may
    look.)"""
    return profiler._is_profiler_enabled or torch.cuda.is_initialized()


#: whether a profiler may be at work
is_profiled: Callable[[], bool] = callback_query() or maybe_profiled


def is_observed(of: Optimizer) -> bool:
    """Whether a step of this optimizer is recorded, or has hooks."""
    return bool(
        is_profiled()
        or of._optimizer_step_pre_hooks
        or of._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
