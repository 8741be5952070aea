"""How the parameters of a group are sorted into buckets."""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import selection
from ..dtensor import local
from .bucket import Bucket
from .fit import why_not_alike, why_not_stored
from .memory import flat, gaps, in_order, packed
from .pieces import cuts

if TYPE_CHECKING:
    from .optimizer import MultiTensor

Group = dict[str, Any]

#: how many plans of a group are remembered, for gradients that come and go
PLANS = 4
#: adjacent states may have one gap per this number of tensors, so that nothing moves when a
#: parameter has no gradient in a step
FEW = 8


class Plan:
    """How one group is updated: some parameters in buckets, the rest by torch."""

    def __init__(self, group: Group, buckets: list[Bucket], rest: list[Tensor]) -> None:
        self.buckets, self.rest = buckets, rest
        self._members = tuple(group["params"])
        self._without = [p for p in self._members if p.grad is None]
        self._backend = selection.get_backend()
        self._flags = _flags(group)

    def grads(self, group: Group) -> list[list[Tensor]] | None:
        """This step's gradients, one list per bucket; None if the plan no longer fits."""
        members = group["params"]
        if (
            len(members) != len(self._members)
            or not all(map(operator.is_, members, self._members))
            or self._backend != selection.get_backend()
            or self._flags != _flags(group)
        ):
            return None
        for p in self._without:
            if p.grad is not None:
                return None
        grads = []
        for bucket in self.buckets:
            if (mine := bucket.grads()) is None:
                return None
            grads.append(mine)
        return grads


def _flags(group: Group) -> tuple[bool, ...]:
    """The hyperparameters that decide which states a parameter has, and what updates it."""
    return (
        bool(group.get("momentum")),
        bool(group.get("amsgrad")),
        bool(group.get("centered")),
        bool(group.get("capturable")),
    )


def add_plan(optimizer: MultiTensor, group: Group, plans: list[Plan]) -> Plan:
    """Adds a new plan before ``plans``. Those are dropped if the new one had to move a state."""
    before = [
        (state, name, t)
        for p in group["params"]
        if (state := optimizer.state.get(p))
        for name, t in state.items()
    ]
    plan = _plan(optimizer, group)
    if any(state.get(name) is not t for state, name, t in before):
        plans.clear()
    plans.insert(0, plan)
    del plans[PLANS:]
    return plan


def _plan(optimizer: MultiTensor, group: Group) -> Plan:
    params: list[Tensor] = []
    grads: list[Tensor] = []
    lists: list[list[Any]] = [[] for _ in optimizer._rule.states]
    with away_from_the_default_device():
        optimizer._init_group(group, params, grads, *lists)  # type: ignore[attr-defined]
    states = {name: ts for name, ts in zip(optimizer._rule.states, lists, strict=True) if ts}
    alike: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        mine = {name: tensors[i] for name, tensors in states.items()}
        alike.setdefault(_kind(optimizer, group, p, g, mine), []).append(i)
    rest = [params[i] for i in alike.pop(None, [])]
    buckets = [
        _bucket(
            optimizer,
            [params[i] for i in which],
            [grads[i] for i in which],
            {name: [tensors[i] for i in which] for name, tensors in states.items()},
        )
        for which in alike.values()
    ]
    return Plan(group, buckets, rest)


def _kind(
    optimizer: MultiTensor, group: Group, p: Tensor, g: Tensor, states: dict[str, Tensor | None]
) -> Any:
    """What parameters of one bucket have in common; None for one that torch updates.

    Raises:
        RuntimeError: torch would ignore its master, or stochastic rounding.
    """
    backend, wide = optimizer._backend(p), optimizer._is_wide(p)
    there = [s for name, s in states.items() if s is not None and name != "step"]
    if wide and "master_param" in optimizer.state.get(p, {}):
        there.append(optimizer.state[p]["master_param"])
    why_not = why_not_stored(group, p, g, there)
    if why_not is not None and wide:
        asked = "master_weights" if optimizer.master_weights else "bf16_stochastic_round"
        raise RuntimeError(f"{asked}=True cannot be combined with {why_not}")
    if why_not is not None or (not wide and why_not_alike(group, p, g, there, backend)):
        return None
    here, missing = local(p), [*states.values()].count(None)
    sharded = hasattr(p, "placements")
    return backend, here.device, p.dtype, g.dtype, sharded, here.is_contiguous(), missing


def _bucket(
    optimizer: MultiTensor,
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Any]],
) -> Bucket:
    """A bucket of these parameters. Their states are created, widened and moved as it needs
    them."""
    backend, wide = optimizer._backend(params[0]), optimizer._is_wide(params[0])
    together = backend == "aten" and not hasattr(params[0], "placements")
    fresh = False
    for name, tensors in states.items():
        if tensors[0] is None:
            fresh, tensors = True, list(map(torch.zeros_like, params))
        if name == "step":
            tensors = _counts(tensors, local(params[0]).device, backend)
        elif wide:
            tensors = [in_order(t.float(), p) for t, p in zip(tensors, params, strict=True)]
        if together and name in optimizer._rule.packed:
            _pack(tensors)
        states[name] = tensors
        _store(optimizer, params, name, tensors)
    masters = _masters(optimizer, params) if wide and optimizer.master_weights else None
    return Bucket(
        params, grads, states, masters, backend,
        fresh=fresh, together=together, packed=optimizer._rule.packed,
    )  # fmt: skip


def _counts(tensors: list[Tensor], device: torch.device, backend: str) -> list[Tensor]:
    """Counts of steps on ``device``. They are made adjacent if most of them are not, or if a kernel
    reads them."""
    tensors = [t if t.device == device else _moved(t, device) for t in tensors]
    if backend == "triton":
        return packed([t.float() for t in tensors])
    return packed(tensors) if _mostly_apart(tensors) else tensors


def _pack(tensors: list[Tensor]) -> None:
    """Makes the states of each piece adjacent if most of them are not."""
    if _mostly_apart(list(map(flat, tensors))):
        for which, elements in cuts(tensors, together=True):
            if elements is None:
                tensors[which] = packed(tensors[which])


def _mostly_apart(tensors: list[Tensor]) -> bool:
    return len(gaps(tensors)) > len(tensors) // FEW


def _masters(optimizer: MultiTensor, params: list[Tensor]) -> list[Tensor]:
    """The float32 copies of half-precision parameters. Missing ones are created."""
    masters = [
        in_order(optimizer.state[p].get("master_param", p.detach().float()), p) for p in params
    ]
    _store(optimizer, params, "master_param", masters)
    return masters


def _store(optimizer: MultiTensor, params: list[Tensor], name: str, tensors: list[Tensor]) -> None:
    for p, t in zip(params, tensors, strict=True):
        optimizer.state[p][name] = t


def away_from_the_default_device() -> AbstractContextManager[Any]:
    """torch's own classes count steps on the default device, and fail if it is neither the CPU nor
    the parameters' device."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _moved(count: Tensor, device: torch.device) -> Tensor:
    """A count of steps on ``device``. Some of torch's own classes create it on the default device,
    and on "meta" it would have no data."""
    return torch.zeros_like(count, device=device) if count.is_meta else count.to(device)
