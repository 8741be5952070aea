"""The memory that a call takes at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes of tensors that ``call`` allocates at its peak, beyond those allocated before. It is
    called twice."""
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # the profiler reports its own start and stop below that
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = call()
    del results
    now = peak = 0
    events = (e for e in profile.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
