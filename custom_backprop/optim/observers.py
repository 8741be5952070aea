"""Whether anything observes an optimizer's steps.

torch.optim wraps ``step`` and ``zero_grad``, so that hooks run and a profiler sees each call by its
name. That takes 30 to 50 us even if there is neither, which is as long as the step of a small
network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer


def callback_query() -> Callable[[], bool] | None:
    """``at::hasCallbacks``: whether something is called back for what runs on this thread. It may
    be a profiler that was started by Python or by something else, or an execution trace. None if
    the library does not export the symbol."""
    found = getattr(ctypes.PyDLL(torch._C.__file__), "_ZN2at12hasCallbacksEv", None)
    if found is not None:
        found.argtypes, found.restype = [], ctypes.c_bool
    return found


def maybe_profiled() -> bool:
    """The same, as far as Python knows. (On a GPU, something outside of Python may observe.)"""
    return profiler._is_profiler_enabled or torch.cuda.is_initialized()


#: whether a profiler may be active
is_profiled: Callable[[], bool] = callback_query() or maybe_profiled


def is_observed(of: Optimizer) -> bool:
    """Whether a step of this optimizer is observed or has hooks."""
    return bool(
        is_profiled()
        or of._optimizer_step_pre_hooks
        or of._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
