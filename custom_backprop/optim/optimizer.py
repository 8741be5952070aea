"""What the optimizers share: torch.optim's own class underneath, and a step that updates many parameters at once.

Constructor, groups, state, checkpoints, hooks and schedulers are inherited. Replaced is the update alone, and only of what it is written for:
dense real tensors. What else torch.optim takes (sparse, complex, ``capturable``, ``differentiable``, ...) goes to torch's own update.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import selection
from .bucket import Bucket, gathered, runs

Group = dict[str, Any]

_PLAIN = (Tensor, torch.nn.Parameter)


class Plan:
    """How one group is updated: in buckets, and the rest one by one."""

    def __init__(self, group: Group, buckets: list[Bucket], rest: list[Tensor]) -> None:
        self.buckets, self.rest = buckets, rest
        self._members = tuple(group["params"])
        self._without = [p for p in self._members if p.grad is None]

    def grads(self, group: Group) -> list[list[Tensor]] | None:
        """This step's gradients, a list for each bucket; None if the plan no longer fits."""
        members = group["params"]
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            return None
        if any(p.grad is not None for p in self._without) or any(p.grad is None for p in self.rest):
            return None
        grads = []
        for bucket in self.buckets:
            mine = bucket.grads()
            if mine is None:
                return None
            grads.append(mine)
        return grads


class MultiTensor(Optimizer):
    """Mixed in before a class of torch.optim: ``class SGD(MultiTensor, torch.optim.SGD)``."""

    _torch: ClassVar[Any]
    #: the lists that ``_init_group`` fills after parameters and gradients, by the name of the state they hold
    _states: ClassVar[tuple[str, ...]]
    #: those that the CPU's update wants one behind the other
    _flat: ClassVar[tuple[str, ...]] = ()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, computes the loss again (and its gradients), which is returned."""
        if self.defaults["differentiable"] or torch.compiler.is_compiling():
            return _plain_step(self._torch)(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def _update(self) -> None:
        plans = self._plans()
        for group in self.param_groups:
            plan: Plan | None = plans.get(id(group))
            grads = plan and plan.grads(group)
            if grads is None:
                plans[id(group)] = plan = self._plan(group)
                grads = plan.grads(group)
            assert plan is not None
            assert grads is not None
            for bucket, mine in zip(plan.buckets, grads, strict=True):
                self._aten(bucket, mine, group)
            if plan.rest:
                self._update_by_torch(group, plan.rest)
        self.__dict__["_known"] = list(chain.from_iterable(s.values() for s in self.state.values()))

    def _plans(self) -> dict[int, Plan]:
        """Last step's plans, if every state is still what it was, else none."""
        known: list[Any] = self.__dict__.get("_known", [])
        values = list(chain.from_iterable(s.values() for s in self.state.values()))
        plans: dict[int, Plan] = self.__dict__.setdefault("_kept", {})
        if len(values) != len(known) or not all(map(is_, values, known)):
            plans.clear()
        return plans

    def _plan(self, group: Group) -> Plan:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        lists: list[list[Any]] = [[] for _ in self._states]
        self._init_group(group, params, grads, *lists)
        states = {name: tensors for name, tensors in zip(self._states, lists, strict=True) if tensors}
        alike: dict[Any, list[int]] = {}
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            alike.setdefault(self._kind(group, p, g, [s[i] for s in states.values()]), []).append(i)
        rest = [params[i] for i in alike.pop(None, [])]
        buckets = [
            self._bucket([params[i] for i in which], [grads[i] for i in which], {n: [s[i] for i in which] for n, s in states.items()})
            for which in alike.values()
        ]
        return Plan(group, buckets, rest)

    def _kind(self, group: Group, p: Tensor, g: Tensor, states: list[Tensor | None]) -> Any:
        """What parameters of one bucket have in common; None for one that torch updates."""
        if (
            type(p) not in _PLAIN
            or type(g) is not Tensor
            or not p.is_cpu
            or not p.is_floating_point()
            or p.layout != torch.strided
            or g.layout != torch.strided
            or group.get("capturable")
            or any(isinstance(v, Tensor) and v.requires_grad for v in group.values())
        ):
            return None
        shaped = [s for s in states if s is not None and s.dim() == p.dim() and s.numel() == p.numel()]
        dense = torch.empty_like(p, device="meta").stride()
        if any(t.stride() != dense for t in (p, g, *shaped)) or any(s.dtype != p.dtype for s in shaped):
            return None
        return p.device, p.dtype, g.dtype, p.is_contiguous(), tuple(s is None for s in states)

    def _bucket(self, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]) -> Bucket:
        fresh = any(s[0] is None for s in states.values())
        for name, tensors in states.items():
            if fresh:
                states[name] = tensors = list(map(torch.zeros_like, params))
            if name == "step":
                states[name] = gathered(tensors)
            elif name in self._flat:
                for which, elements in runs(params):
                    if elements is None:
                        tensors[which] = gathered(tensors[which])
            for p, t in zip(params, states[name], strict=True):
                self.state[p][name] = t
        return Bucket(params, grads, states, fresh)

    def _update_by_torch(self, group: Group, params: list[Tensor]) -> None:
        """torch's own update of some parameters of a group."""
        groups, self.param_groups = self.param_groups, [{**group, "params": params}]
        try:
            _plain_step(self._torch)(self)
        finally:
            self.param_groups = groups

    def _aten(self, bucket: Bucket, grads: list[Tensor], group: Group) -> None:
        raise NotImplementedError


def _plain_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """A class's ``step`` without the hooks and the profiler's record, in which the first instance of that very class wraps it."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
