"""How a function of anybody can be run: in float64 or only in float32, with its own copies of what
it overwrites, or not at all."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .case import Case, gradients, outputs


class CannotRun(Exception):
    """The function does not run on this machine, or not with these inputs."""


def prepared(case: Case, dtype: torch.dtype | None) -> tuple[Case, list[str]]:
    """The case in the dtype in which it can be checked, and notes on what was done.

    Raises:
        CannotRun: the function, or the reference, raises whatever is tried.
        ValueError: ``dtype`` is neither float64 nor float32.
    """
    if dtype not in (None, torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    dtypes = (torch.float64, torch.float32) if dtype is None else (dtype,)
    tried: dict[torch.dtype, Exception] = {}
    for in_dtype, isolated in product(dtypes, (False, True)):
        found = replace(case.to(in_dtype), isolated=isolated)
        if (error := _error(found)) is None:
            break
        tried.setdefault(in_dtype, error)
    else:
        first = next(iter(tried.values()))
        raise CannotRun(f"{type(first).__name__}: {first}")
    reason = _why_not_float64(found, dtype, tried)
    if reason and found.exact:
        found = replace(case.to(torch.float32), isolated=found.isolated, refuses_float64=reason)
    if found.reference is not None:
        try:
            outputs(found.call_reference(*found.leaves))
        except Exception as error:
            raise CannotRun(f"the reference raises {type(error).__name__}: {error}") from error
    notes = [f"checked in float32: {reason}"] if reason else []
    if not found.isolated:
        found = replace(found, isolated=_overwrites(found))
    if found.isolated:
        notes.append("it overwrites what it gets: every call was given copies")
    return found, notes


def _error(case: Case) -> Exception | None:
    """What a forward call raises."""
    try:
        outputs(case.call(*case.leaves))
    except Exception as error:
        return error
    return None


def _why_not_float64(
    case: Case, asked: torch.dtype | None, tried: dict[torch.dtype, Exception]
) -> str:
    """Why the case must be checked in float32; empty if it need not be."""
    if asked == torch.float64:
        return ""
    if asked == torch.float32:
        return "asked for"
    error = tried.get(torch.float64)
    if error and torch.float32 in {a.dtype for a in case.leaves}:
        return f"in float64 it raises {type(error).__name__}: {error}"
    if _only_backward_refuses(case):
        return "its backward raises in float64, and not in float32"
    if _computes_in_float32(case):
        return "its results in float64 are numbers of float32"
    return ""


def _only_backward_refuses(case: Case) -> bool:
    try:
        _results(case)
    except Exception:
        try:
            _results(case.to(torch.float32))
        except Exception:
            return False
        return True
    return False


def _computes_in_float32(case: Case) -> bool:
    """Whether every result for inputs of float64 is a number of float32, though not an integer, and
    the reference's results are not."""
    nudged = case.nudged(0)
    try:
        ours = _results(nudged)
        theirs = _results(replace(nudged, function=nudged.reference)) if nudged.reference else ()
    except Exception:
        return False
    if all(torch.equal(t, t.round()) for t in ours):
        return False
    return all(map(_is_float32, ours)) and not (theirs and all(map(_is_float32, theirs)))


def _is_float32(t: Tensor) -> bool:
    return torch.equal(t.float().double().nan_to_num(), t.double().nan_to_num())


def _results(case: Case) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = case.leaves
    results = outputs(case.call(*leaves))
    if not any(r.requires_grad for r in results):
        return [r.detach() for r in results]
    found: tuple[Any, ...] = gradients(case.call, leaves)
    return [t.detach() for part in found for t in part if t is not None]


def _overwrites(case: Case) -> bool:
    try:
        return bool(case.overwritten())
    except Exception:
        return False
