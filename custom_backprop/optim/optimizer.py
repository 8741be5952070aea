"""What the optimizers share: torch.optim's own class underneath, and a step that updates many
parameters at once.

Constructor, groups, state, checkpoints, hooks and schedulers are inherited. Replaced is the update
alone, and only of what it is written
for: dense real tensors. What else torch.optim takes (sparse, complex, ``capturable``,
``differentiable``, ...) goes to torch's own update.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import selection
from ..backends.kernels import kernels
from ..dtensor import local
from ..formulas.optim import clip_factor, stochastically_rounded
from ..formulas.precision import HALF, widen
from .bucket import Bucket, flat, gaps, gathered, in_order, norm, runs, same_order
from .observers import is_observed, is_profiled

Group = dict[str, Any]

#: of each group: where gradients come and go, as many patterns are remembered
PLANS = 4
#: one gap in as many tensors is left between states that lie one behind the other, so that nothing
#: moves when a parameter sits out a step
FEW = 8


class Plan:
    """How one group is updated: in buckets, and the rest by torch."""

    def __init__(self, group: Group, buckets: list[Bucket], rest: list[Tensor]) -> None:
        self.buckets, self.rest = buckets, rest
        self._members = tuple(group["params"])
        self._without = [p for p in self._members if p.grad is None]
        self._backend = selection.get_backend()
        self._states = _states_of(group)

    def grads(self, group: Group) -> list[list[Tensor]] | None:
        """This step's gradients, a list for each bucket; None if the plan no longer fits."""
        members = group["params"]
        if (
            len(members) != len(self._members)
            or not all(map(operator.is_, members, self._members))
            or self._backend != selection.get_backend()
            or self._states != _states_of(group)
        ):
            return None
        for p in self._without:
            if p.grad is not None:
                return None
        for p in self.rest:
            if p.grad is None:
                return None
        grads = []
        for bucket in self.buckets:
            if (mine := bucket.grads()) is None:
                return None
            grads.append(mine)
        return grads


def _states_of(group: Group) -> tuple[bool, ...]:
    """The hyperparameters that decide which state a parameter has."""
    return (
        bool(group.get("momentum")),
        bool(group.get("amsgrad")),
        bool(group.get("centered")),
        bool(group.get("capturable")),
    )


class MultiTensor(Optimizer):
    """Mixed in before a class of torch.optim: ``class SGD(MultiTensor, torch.optim.SGD)``. It adds
    three arguments to the constructor.

    Args:
        max_grad_norm: all gradients of this optimizer are multiplied by
            :func:`~custom_backprop.formulas.optim.clip_factor` of their total 2-norm, as
            ``clip_grad_norm_`` would do before the step, but on the way: ``.grad`` itself is not
            changed.
        master_weights: float16 and bfloat16 parameters are updated in a float32 copy, kept as
            ``master_param`` in their state, and rounded from it. Their other state is float32 too.
        bf16_stochastic_round: bfloat16 parameters are updated in float32 and rounded up or down at
            random, the nearer the likelier; no copy is kept. Their state is float32. The noise
            follows ``torch.manual_seed``.

    Raises:
        ValueError: ``max_grad_norm`` is negative or NaN, two of the ways to round are asked for, or
            one of these arguments is combined with ``differentiable=True``.
        RuntimeError: at a step, ``master_weights`` or ``bf16_stochastic_round`` meets what only
            torch's own update takes: ``capturable``, sparse gradients, subclasses of Tensor.
    """

    #: ``step`` applies the attributes ``grad_scale`` and ``found_inf`` that a GradScaler sets; on a
    #: GPU without reading them
    _step_supports_amp_scaling = True

    #: torch's class, whose ``step`` takes what ours is not written for
    _torch: ClassVar[Any]
    #: the update rule: its name in ``triton_kernels/optim.py``, its formula and the hyperparameters
    #: that this takes
    _rule: ClassVar[str]
    _formula: ClassVar[Callable[..., Any]]
    _takes: ClassVar[tuple[str, ...]]
    _hyper: ClassVar[tuple[str, ...]]
    #: the lists that ``_init_group`` fills after parameters and gradients, by the name of the state
    #: they hold
    _state_names: ClassVar[tuple[str, ...]]
    #: the states in the order of the kernels
    _slots: ClassVar[tuple[str, ...]]
    #: the states that the CPU's update wants one behind the other
    _adjacent: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_formula" in vars(cls):
            takes = inspect.signature(cls._formula).parameters.values()
            cls._takes = tuple(p.name for p in takes if p.kind is p.KEYWORD_ONLY)
            cls._hyper = tuple(name for name in cls._takes if name not in ("t", "fresh"))
        if "_torch" in vars(cls):
            ours = list(inspect.signature(MultiTensor.__init__).parameters.values())[3:-1]
            theirs = inspect.signature(cls._torch.__init__)
            cls.__signature__ = theirs.replace(
                parameters=[*list(theirs.parameters.values())[1:], *ours]
            )  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Any,
        *args: Any,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        bf16_stochastic_round: bool = False,
        **kwargs: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        if master_weights and bf16_stochastic_round:
            raise ValueError(
                "master_weights and bf16_stochastic_round are two ways to round: choose one"
            )
        if kwargs.get("differentiable") and (
            max_grad_norm is not None or master_weights or bf16_stochastic_round
        ):
            raise ValueError(
                "differentiable=True runs torch's own update, which has no max_grad_norm, master_weights or bf16_stochastic_round"
            )
        self.max_grad_norm, self.master_weights, self.bf16_stochastic_round = (
            max_grad_norm,
            master_weights,
            bf16_stochastic_round,
        )
        super().__init__(params, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        mine = ("max_grad_norm", "master_weights", "bf16_stochastic_round")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_kept", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the state of a half-precision parameter to its dtype: where
        ours is float32, it stays so."""
        if not (self.master_weights or self.bf16_stochastic_round):
            super().load_state_dict(state_dict)
            return
        loaded: dict[str, Any] = {}
        with_hooks = self.register_load_state_dict_pre_hook(
            lambda optimizer, seen: loaded.update(seen)
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            with_hooks.remove()
        ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        for i, p in zip(
            ids, chain.from_iterable(group["params"] for group in self.param_groups), strict=True
        ):
            if self._is_wide(p):
                for name, value in loaded["state"].get(i, {}).items():
                    if name != "step" and isinstance(value, Tensor):
                        self.state[p][name] = value.to(
                            device=p.device, dtype=torch.float32, copy=True
                        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, computes the loss again (and its gradients), and the
        loss is returned."""
        # a subclass that overrides this has torch's wrapper around its own
        if type(self).step is MultiTensor.step and (
            torch.compiler.is_compiling() or is_observed(self)
        ):
            return _observed_step(self, closure)
        return self._unobserved_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it at every call

    def _unobserved_step(self, closure: Callable[[], Any] | None) -> Any:
        if torch.compiler.is_compiling():
            extra = (
                self.max_grad_norm is not None or self.master_weights or self.bf16_stochastic_round
            )
            return (
                torch.compiler.disable(self._eager)(closure)
                if extra
                else _plain_step(self._torch)(self, closure)
            )
        return (
            _plain_step(self._torch)(self, closure)
            if self.defaults["differentiable"]
            else self._eager(closure)
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets every gradient to None, or to 0."""
        if not set_to_none or (not torch.compiler.is_compiling() and is_profiled()):
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _eager(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(
            False
        )  # torch.no_grad() less its frames: a step of few parameters is all host
        try:
            self._step()
        finally:
            torch._C._set_grad_enabled(enabled)
        return loss

    def _step(self) -> None:
        found: Tensor | None = self.__dict__.get("found_inf")
        if found is not None and self._reads(found) and found.item():
            return
        plans = self._plans()
        work: list[tuple[Group, Plan, list[list[Tensor]]]] = []
        moved = not plans
        for group in self.param_groups:
            kept = plans.setdefault(id(group), [])
            for plan in kept:
                if (grads := plan.grads(group)) is not None:
                    break
            else:
                plan, moved = self._plan(group, kept), True
                grads = plan.grads(group)
                assert grads is not None
            work.append((group, plan, grads))
        factor = (
            None
            if self.max_grad_norm is None and "grad_scale" not in self.__dict__
            else self._factor(work)
        )
        for group, plan, grads in work:
            for bucket, mine in zip(plan.buckets, grads, strict=True):
                self._update(group, bucket, mine, factor, found)
            if plan.rest and not (found is not None and found.item()):
                self._by_torch(group, plan.rest, factor)
                moved = True
        if moved:
            self.__dict__["_known"] = list(
                chain.from_iterable(s.values() for s in self.state.values())
            )

    def _reads(self, found: Tensor) -> bool:
        """Whether ``found_inf`` is read before anything is done. The kernels read it themselves,
        but for a state that they would begin."""
        return selection.backend_for(found.device.type) != "triton" or any(
            group.get("dampening") for group in self.param_groups
        )

    def _plans(self) -> dict[int, list[Plan]]:
        """The last steps' plans, if every state is still what it was, else none. A group has
        several where gradients come and go."""
        known: list[Any] = self.__dict__.get("_known", [])
        values = list(chain.from_iterable(s.values() for s in self.state.values()))
        plans: dict[int, list[Plan]] = self.__dict__.setdefault("_kept", {})
        if len(values) != len(known) or not all(map(operator.is_, values, known)):
            plans.clear()
        return plans

    def _plan(self, group: Group, kept: list[Plan]) -> Plan:
        """A new plan, which joins ``kept``; those that are there go if it had to move a state."""
        before = [
            (state, name, t)
            for p in group["params"]
            if (state := self.state.get(p))
            for name, t in state.items()
        ]
        plan = self._planned(group)
        if any(state.get(name) is not t for state, name, t in before):
            kept.clear()
        kept.insert(0, plan)
        del kept[PLANS:]
        return plan

    def _planned(self, group: Group) -> Plan:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        lists: list[list[Any]] = [[] for _ in self._state_names]
        with _away_from_the_default_device():
            self._init_group(group, params, grads, *lists)  # type: ignore[attr-defined]
        states = {
            name: tensors for name, tensors in zip(self._state_names, lists, strict=True) if tensors
        }
        alike: dict[Any, list[int]] = {}
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            alike.setdefault(
                self._kind(group, p, g, {name: tensors[i] for name, tensors in states.items()}), []
            ).append(i)
        rest = [params[i] for i in alike.pop(None, [])]
        buckets = [
            self._bucket(
                [params[i] for i in which],
                [grads[i] for i in which],
                {n: [s[i] for i in which] for n, s in states.items()},
            )
            for which in alike.values()
        ]
        return Plan(group, buckets, rest)

    def _kind(self, group: Group, p: Tensor, g: Tensor, states: dict[str, Tensor | None]) -> Any:
        """What parameters of one bucket have in common; None for one that torch updates.

        Raises:
            RuntimeError: that would be one whose master, or whose rounding at random, torch would
                leave out.
        """
        if (why := self._why_not(group, p, g, states)) is not None:
            if self._is_wide(p):
                asked = "master_weights" if self.master_weights else "bf16_stochastic_round"
                raise RuntimeError(f"{asked}=True does not go with {why}")
            return None
        here, missing = local(p), [*states.values()].count(None)
        return (
            self._backend(p),
            here.device,
            p.dtype,
            g.dtype,
            hasattr(p, "placements"),
            here.is_contiguous(),
            missing,
        )

    def _why_not(
        self, group: Group, p: Tensor, g: Tensor, states: dict[str, Tensor | None]
    ) -> str | None:
        """Why a parameter is torch's to update, in words that end what it does not go with; None
        where it is ours."""
        placements = getattr(
            p, "placements", None
        )  # of a DTensor, whose shards are updated like any tensor
        plain = type(p) in (Tensor, torch.nn.Parameter) and type(g) is Tensor
        wide = self._is_wide(p)
        master = self.state[p].get("master_param") if wide and p in self.state else None
        held = [
            s
            for s in (master, *(s for name, s in states.items() if name != "step"))
            if s is not None
        ]
        if group.get("capturable"):
            return "capturable=True, which is torch's own update: leave out one of the two"
        if any(t.layout != torch.strided for t in (p, g, *held)):
            return "sparse tensors: make parameters, gradients and states dense"
        if not p.is_floating_point():
            return "complex parameters"
        if not (
            plain
            or (
                placements and all(getattr(t, "placements", None) == placements for t in (g, *held))
            )
        ):
            return f"a {type(p).__name__} that has a gradient of type {type(g).__name__}: take plain tensors, or DTensors placed alike"
        if any(t.shape != p.shape or t.device != p.device for t in (g, *held)):
            return f"a gradient or state of another shape, or on another device, than the parameter: {tuple(p.shape)} on {p.device}"
        here = local(p)
        if here.is_neg() or not (
            here.is_contiguous() or here.stride() == torch.empty_like(here, device="meta").stride()
        ):
            return "a parameter whose elements lie apart in memory, or are stored negated: give it a clone of its data"
        if wide:
            return None
        numbers = chain(group.values(), group.get("betas", ()))
        if any(isinstance(v, Tensor) and (v.requires_grad or not v.is_cpu) for v in numbers):
            return "hyperparameters on a GPU, or part of a graph"
        if not all(same_order(local(t), here) for t in (g, *held)) or any(
            s.dtype != p.dtype for s in held
        ):
            return "gradients or states of other strides or dtypes"
        if here.device.type not in ("cpu", "cuda", "meta") or (
            self._backend(p) == "aten" and not (here.is_cpu and g.dtype == p.dtype)
        ):
            return f"the device {here.device}, or gradients of dtype {g.dtype}"
        return None

    def _is_wide(self, p: Tensor) -> bool:
        """Whether the state of ``p`` is float32 though it is not."""
        return (self.master_weights and p.dtype in HALF) or (
            self.bf16_stochastic_round and p.dtype == torch.bfloat16
        )

    def _backend(self, p: Tensor) -> str:
        """What updates ``p``. By ATen we have an update on a CPU; elsewhere the formula does what
        torch's own would leave out."""
        device = local(p).device.type
        backend = selection.backend_for(device)
        return "formula" if backend == "aten" and device != "cpu" and self._is_wide(p) else backend

    def _bucket(
        self, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Any]]
    ) -> Bucket:
        device, wide = local(params[0]).device, self._is_wide(params[0])
        backend = self._backend(params[0])
        together = backend == "aten" and not hasattr(params[0], "placements")
        fresh = False
        for name, tensors in states.items():
            if tensors[0] is None:
                fresh, tensors = True, list(map(torch.zeros_like, params))
            if name == "step":
                tensors = [t if t.device == device else _moved(t, device) for t in tensors]
                tensors = [t.float() for t in tensors] if backend == "triton" else tensors
                if backend == "triton" or len(gaps(tensors)) > len(tensors) // FEW:
                    tensors = gathered(tensors)
            else:
                tensors = (
                    [in_order(t.float(), p) for t, p in zip(tensors, params, strict=True)]
                    if wide
                    else tensors
                )
                if (
                    together
                    and name in self._adjacent
                    and len(gaps(list(map(flat, tensors)))) > len(tensors) // FEW
                ):
                    for which, elements in runs(tensors, together):
                        if elements is None:
                            tensors[which] = gathered(tensors[which])
            states[name] = tensors
            for p, t in zip(params, tensors, strict=True):
                self.state[p][name] = t
        masters = None
        if wide and self.master_weights:
            masters = [
                in_order(self.state[p].get("master_param", p.detach().float()), p) for p in params
            ]
            for p, master in zip(params, masters, strict=True):
                self.state[p]["master_param"] = master
        return Bucket(
            params,
            grads,
            states,
            masters,
            backend,
            fresh=fresh,
            together=together,
            adjacent=self._adjacent,
        )

    def _numbers(self, group: Group) -> dict[str, Any]:
        """A group's hyperparameters as the formula takes them, all of them numbers."""
        numbers = {}
        for name in self._hyper:
            value = group[name]
            numbers[name] = value if type(value) in (float, bool) else _number(value)
        return numbers

    def _factor(self, work: list[tuple[Group, Plan, list[list[Tensor]]]]) -> Tensor | None:
        """What every gradient is multiplied by: the inverse of the GradScaler's scale, and what
        clipping asks for."""
        scale: Tensor | None = self.__dict__.get("grad_scale")
        factor = None if scale is None else scale.double().reciprocal()
        if self.max_grad_norm is None:
            return factor
        norms: list[Tensor] = []
        for _, plan, grads in work:
            norms += chain.from_iterable(
                bucket.norms(mine) for bucket, mine in zip(plan.buckets, grads, strict=True)
            )
            norms += [norm(p.grad) for p in plan.rest if p.grad is not None]
        if not norms:
            return factor
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        if factor is None:
            return clip_factor(total, self.max_grad_norm)
        factor = factor.to(total.device)
        return factor * clip_factor(total * factor, self.max_grad_norm)

    def _update(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        factor: Tensor | None,
        found: Tensor | None,
    ) -> None:
        backend = bucket.backend
        if found is not None and backend != "triton" and found.item():
            return
        hyper = self._numbers(group)
        bucket.refresh_masters()
        stochastic = self.bf16_stochastic_round and bucket.dtype == torch.bfloat16
        if backend == "triton":
            if found is not None:
                found = found.to(bucket.device, non_blocking=True)
            bucket.count(1 if found is None else 1 - found)
            if factor is not None:
                factor = factor.to(
                    bucket.device,
                    torch.float64 if bucket.dtype == torch.float64 else torch.float32,
                    non_blocking=True,
                )
            seed = int(torch.randint(2**40, (), device="cpu")) if stochastic else None
            kernels("optim").update(
                self._rule, bucket.table(self._slots), grads, bucket.steps, hyper, scale=factor, found_inf=found,
                fresh=bucket.fresh and bool(hyper.get("dampening")), seed=seed,
            )  # fmt: skip
        else:
            bucket.count(1)
            if backend == "formula" or stochastic:
                self._by_formula(bucket, grads, hyper, factor, stochastic)
            else:
                multiplier = 1.0 if factor is None else factor.item()
                self._aten(
                    group,
                    bucket,
                    grads if bucket.rounded is None else [g.float() for g in grads],
                    hyper,
                    multiplier,
                )
                if bucket.rounded is not None:
                    torch._foreach_copy_(bucket.rounded, bucket.flats)
        bucket.fresh = False
        bucket.note_versions()

    def _by_formula(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: Tensor | None,
        stochastic: bool,
    ) -> None:
        for i, (p, g) in enumerate(zip(bucket.flats, grads, strict=True)):
            here: dict[str, Any] = {
                name: widen(tensors[i]) for name, tensors in bucket.states.items() if name != "step"
            }
            if "step" in bucket.states and "t" in self._takes:
                here["t"] = bucket.states["step"][i].item()
            if bucket.fresh:
                here["fresh"] = True
            g = widen(g.view(-1))
            new, states = type(self)._formula(
                widen(p), g if factor is None else g * factor.to(g.device), **here, **hyper
            )
            p.copy_(
                stochastically_rounded(new, torch.randint_like(new, 2**16, dtype=torch.int32))
                if stochastic
                else new
            )
            if bucket.rounded is not None:
                bucket.rounded[i].copy_(new)
            for name, state in states.items():
                bucket.states[name][i].copy_(state)

    def _by_torch(self, group: Group, params: list[Tensor], factor: Tensor | None) -> None:
        """torch's own update of some parameters of a group."""
        groups, grads = self.param_groups, [p.grad for p in params]
        scaler: dict[str, Any] = {
            name: self.__dict__.pop(name)
            for name in ("grad_scale", "found_inf")
            if name in self.__dict__
        }
        own = {**group, "params": params}
        if group.get("fused") and all(g is not None and g.layout == torch.strided for g in grads):
            own["fused"] = (
                False  # torch's fused kernels take tensors of different strides for alike (torch 2.13, on a CPU)
            )
        self.param_groups = [own]
        try:
            if factor is not None:
                by = factor if group.get("capturable") else factor.item()
                for p, g in zip(params, grads, strict=True):
                    p.grad = None if g is None else g * by
            with _away_from_the_default_device():
                _plain_step(self._torch)(self)
        finally:
            self.param_groups = groups
            self.__dict__.update(scaler)
            if factor is not None:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        """The update of ``bucket.flats`` by PyTorch's operators, on a CPU."""
        raise NotImplementedError


def _number(value: Any) -> Any:
    """A hyperparameter, or a pair of them, in numbers of type float."""
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _away_from_the_default_device() -> AbstractContextManager[Any]:
    """torch's own classes count steps on the default device, and fail where the count is neither on
    the CPU nor with the parameters."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _moved(count: Tensor, device: torch.device) -> Tensor:
    """A count of steps on ``device``. Some of torch's own classes begin it on the default device,
    and there may be none behind "meta"."""
    return torch.zeros_like(count, device=device) if count.is_meta else count.to(device)


_observed_step = Optimizer.profile_hook_step(MultiTensor._unobserved_step)


def _plain_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """A class's ``step`` without the hooks and the profiler's record, in which the first instance
    of that very class wraps it."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
