"""Whether a module of somebody else's computes what a formula of ours says: it is run on a few
random numbers, in float32 and in bfloat16.

What is run is a bare copy, without hooks and with small random parameters of its own: neither the
module nor the random state changes, and a module on the meta device can be asked on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: the dtypes of the input and of the parameters; half precision shows where a module rounds
SAME = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
MIXED = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))


def device_of(module: torch.nn.Module) -> torch.device:
    """That of its first parameter; a CPU in place of meta."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def numbers(*shape: int, device: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal ones, which leave the random state as it is."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype)


def linear(rows: int, columns: int, seed: int, **where: Any) -> torch.nn.Linear:
    """A layer of random weights without a bias."""
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(numbers(rows, columns, seed=seed, **where))
    return layer


def bare(module: torch.nn.Module, **parts: Any) -> torch.nn.Module:
    """A copy that has these modules and parameters alone, and no hooks."""
    copy = type(module).__new__(type(module))
    torch.nn.Module.__init__(copy)
    settings = {k: v for k, v in module.__dict__.items() if k not in copy.__dict__}
    copy.__dict__.update(settings)
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy


def agree(theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    """Whether both give the same to rounding, of the same dtype. Theirs may raise anything."""
    with torch.no_grad():
        try:
            found = theirs()
        except Exception:
            return False
        expected = ours()
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype:
        return False
    bound = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() <= bound)
