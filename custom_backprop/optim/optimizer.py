"""What the optimizers share: the base class from torch.optim, and a step that updates many
parameters at once.

Constructor, groups, state, checkpoints, hooks and schedulers are inherited. Only the update is
replaced, and only for dense real tensors. Everything else that torch.optim accepts (sparse,
complex, ``capturable``, ``differentiable``, ...) goes to torch's own update.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import selection
from ..dtensor import local
from ..formulas.precision import HALF
from .bucket import Bucket
from .clipping import gradient_factor, norm
from .observers import is_observed, is_profiled
from .plan import Group, Plan, add_plan
from .rule import Rule
from .update import by_torch, torchs_step, update

#: a group, its plan, and the gradients of each of its buckets
Work = tuple[Group, Plan, list[list[Tensor]]]

#: the arguments of the constructor that torch's classes do not have
OWN_ARGUMENTS = ("max_grad_norm", "master_weights", "bf16_stochastic_round")


class MultiTensor(Optimizer):
    """A mixin before a class of torch.optim: ``class SGD(MultiTensor, torch.optim.SGD)``. It adds
    the three arguments of :mod:`custom_backprop.optim` to the constructor."""

    #: ``step`` applies the attributes ``grad_scale`` and ``found_inf`` that a GradScaler sets; on a
    #: GPU without reading them
    _step_supports_amp_scaling = True

    #: torch's class, whose ``step`` takes what ours cannot
    _torch: ClassVar[Any]
    _rule: ClassVar[Rule]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_torch" in vars(cls):
            parameters = inspect.signature(MultiTensor.__init__).parameters
            theirs = inspect.signature(cls._torch.__init__)
            shown = [*theirs.parameters.values()][1:] + [parameters[n] for n in OWN_ARGUMENTS]
            cls.__signature__ = theirs.replace(parameters=shown)  # type: ignore[attr-defined]

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
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights
        self.bf16_stochastic_round = bf16_stochastic_round
        if kwargs.get("differentiable") and self._adds_to_torch():
            raise ValueError(
                "differentiable=True runs torch's own update, which has no "
                + ", ".join(OWN_ARGUMENTS[:2])
                + f" or {OWN_ARGUMENTS[2]}"
            )
        super().__init__(params, *args, **kwargs)

    def _adds_to_torch(self) -> bool:
        """Whether this optimizer was given an argument that torch's classes do not have."""
        rounds = self.master_weights or self.bf16_stochastic_round
        return self.max_grad_norm is not None or rounds

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN_ARGUMENTS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_plans", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that float32 state of a half-precision parameter stays float32.
        Torch's would cast it to the parameter's dtype."""
        if not (self.master_weights or self.bf16_stochastic_round):
            super().load_state_dict(state_dict)
            return
        loaded: dict[str, Any] = {}  # after the user's hooks, which may change it
        last_hook = self.register_load_state_dict_pre_hook(lambda _, seen: loaded.update(seen))
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            if self._is_wide(p):
                for name, value in loaded["state"].get(i, {}).items():
                    if name != "step" and isinstance(value, Tensor):
                        self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, computes the loss and its gradients again. The step then
        returns the loss."""
        # the method of a subclass that overrides this one has torch's wrapper
        if type(self).step is MultiTensor.step and (
            torch.compiler.is_compiling() or is_observed(self)
        ):
            return _observed_step(self, closure)
        return self._unobserved_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it at every call

    def _unobserved_step(self, closure: Callable[[], Any] | None) -> Any:
        if torch.compiler.is_compiling():
            if self._adds_to_torch():
                return torch.compiler.disable(self._eager)(closure)
            return torchs_step(self, closure)
        if self.defaults["differentiable"]:
            return torchs_step(self, closure)
        return self._eager(closure)

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
        # torch.no_grad() without its frames: with few parameters, only the host's time counts
        torch._C._set_grad_enabled(False)
        try:
            self._step()
        finally:
            torch._C._set_grad_enabled(enabled)
        return loss

    def _step(self) -> None:
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        if found_inf is not None and self._reads(found_inf) and found_inf.item():
            return
        work, moved = self._work()
        factor = None
        if self.max_grad_norm is not None or "grad_scale" in self.__dict__:
            factor = gradient_factor(
                self.__dict__.get("grad_scale"), self._norms(work), self.max_grad_norm
            )
        for group, plan, grads in work:
            for bucket, mine in zip(plan.buckets, grads, strict=True):
                update(self, group, bucket, mine, factor, found_inf)
            if plan.rest and not (found_inf is not None and found_inf.item()):
                by_torch(self, group, plan.rest, factor)
                moved = True
        if moved:
            self.__dict__["_last_states"] = self._states()

    def _work(self) -> tuple[list[Work], bool]:
        """The plans of this step, and whether one of them is new. A group has several if gradients
        come and go. All of them are dropped if a state has changed."""
        plans: dict[int, list[Plan]] = self.__dict__.setdefault("_plans", {})
        last, states = self.__dict__.get("_last_states", ()), self._states()
        if len(states) != len(last) or not all(map(operator.is_, states, last)):
            plans.clear()
        work: list[Work] = []
        moved = False
        for group in self.param_groups:
            its = plans.setdefault(id(group), [])
            for plan in its:
                if (grads := plan.grads(group)) is not None:
                    break
            else:
                plan, moved = add_plan(self, group, its), True
                grads = plan.grads(group)
                assert grads is not None
            work.append((group, plan, grads))
        return work, moved

    def _states(self) -> list[Any]:
        return list(chain.from_iterable(state.values() for state in self.state.values()))

    def _reads(self, found_inf: Tensor) -> bool:
        """Whether ``found_inf`` is read before the step. The kernels read it themselves, except if
        they would begin a state."""
        return selection.backend_for(found_inf.device.type) != "triton" or any(
            group.get("dampening") for group in self.param_groups
        )

    def _norms(self, work: list[Work]) -> list[Tensor]:
        """Norms whose norm is that of all gradients; none if it is not needed."""
        norms: list[Tensor] = []
        if self.max_grad_norm is not None:
            for _, plan, grads in work:
                for bucket, mine in zip(plan.buckets, grads, strict=True):
                    norms += bucket.norms(mine)
                norms += [norm(p.grad) for p in plan.rest if p.grad is not None]
        return norms

    def _is_wide(self, p: Tensor) -> bool:
        """Whether ``p`` is not float32 but its state is."""
        return (self.master_weights and p.dtype in HALF) or (
            self.bf16_stochastic_round and p.dtype == torch.bfloat16
        )

    def _backend(self, p: Tensor) -> str:
        """The backend that updates ``p``. Our update by ATen is for a CPU. Elsewhere the formula
        does what torch's own update cannot."""
        device = local(p).device.type
        backend = selection.backend_for(device)
        return "formula" if backend == "aten" and device != "cpu" and self._is_wide(p) else backend

    def _aten(
        self,
        group: Group,
        bucket: Bucket,
        grads: list[Tensor],
        hyper: dict[str, Any],
        factor: float,
    ) -> None:
        """The update of ``bucket.updated`` by PyTorch's operators, on a CPU."""
        raise NotImplementedError


_observed_step = Optimizer.profile_hook_step(MultiTensor._unobserved_step)
