"""Whether anybody looks at an optimizer's steps.

torch.optim wraps ``step`` and ``zero_grad``, so that hooks run and a profiler sees each call by its name. Between two passes over large
tensors that costs 30 to 50 us, as much as the step of a small network, also where there is neither.
"""

from __future__ import annotations

import torch
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer


def is_profiled() -> bool:
    """Whether a profiler may be at work. (Where there is a GPU, one outside of Python may.)"""
    return profiler._is_profiler_enabled or torch.cuda.is_initialized()


def is_observed(of: Optimizer) -> bool:
    """Whether a step of this optimizer is recorded, or has hooks."""
    return bool(
        is_profiled()
        or of._optimizer_step_pre_hooks
        or of._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
