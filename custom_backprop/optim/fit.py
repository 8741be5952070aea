"""Which parameters our update can take. Torch updates all others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..dtensor import local
from .memory import same_order


def why_not_stored(
    group: dict[str, Any], p: Tensor, g: Tensor, states: Iterable[Tensor]
) -> str | None:
    """Why our update cannot take ``p``, given how it, its gradient and its states are stored. It is
    the end of the sentence "... cannot be combined with". None if our update can."""
    others = (g, *states)
    if group.get("capturable"):
        return "capturable=True, which is torch's own update: leave out one of the two"
    if any(t.layout != torch.strided for t in (p, *others)):
        return "sparse tensors: make parameters, gradients and states dense"
    if not p.is_floating_point():
        return "complex parameters"
    placements = getattr(p, "placements", None)  # the shards of a DTensor are ordinary tensors
    if not (
        (type(p) in (Tensor, torch.nn.Parameter) and type(g) is Tensor)
        or (placements and all(getattr(t, "placements", None) == placements for t in others))
    ):
        return (
            f"a {type(p).__name__} that has a gradient of type {type(g).__name__}: "
            "take plain tensors, or DTensors placed alike"
        )
    if any(t.shape != p.shape or t.device != p.device for t in others):
        return (
            "a gradient or state of another shape, or on another device, than the parameter: "
            f"{tuple(p.shape)} on {p.device}"
        )
    if not _dense(local(p)):
        return (
            "a parameter whose elements have gaps in memory, or are stored negated: "
            "give it a clone of its data"
        )
    return None


def why_not_alike(
    group: dict[str, Any], p: Tensor, g: Tensor, states: list[Tensor], backend: str
) -> str | None:
    """The same, for reasons that matter only if parameters and states have the same dtype."""
    here = local(p)
    values = chain(group.values(), group.get("betas", ()))
    if any(isinstance(v, Tensor) and not v.is_cpu for v in values):
        return "hyperparameters on a GPU"
    if not all(same_order(local(t), here) for t in (g, *states)) or any(
        s.dtype != p.dtype for s in states
    ):
        return "gradients or states of other strides or dtypes"
    by_aten = backend == "aten"
    if here.device.type not in ("cpu", "cuda", "meta") or (
        by_aten and not (here.is_cpu and g.dtype == p.dtype)
    ):
        return f"the device {here.device}, or gradients of dtype {g.dtype}"
    return None


def _dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory, and are stored as they are."""
    dense = t.is_contiguous() or t.stride() == torch.empty_like(t, device="meta").stride()
    return dense and not t.is_neg()
