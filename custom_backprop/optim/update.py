"""One step of a bucket, by a kernel, the formula or ATen. Torch updates the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.kernels import kernels
from ..formulas.optim import stochastically_rounded
from ..formulas.precision import widen
from .bucket import Bucket
from .plan import Group, away_from_the_default_device

if TYPE_CHECKING:
    from .optimizer import MultiTensor


def update(
    optimizer: MultiTensor,
    group: Group,
    bucket: Bucket,
    grads: list[Tensor],
    factor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of a bucket on its gradients times ``factor``; no step if ``found_inf`` is not 0."""
    backend = bucket.backend
    if found_inf is not None and backend != "triton" and found_inf.item():
        return
    hyper = _hyperparameters(optimizer._rule.hyper, group)
    bucket.refresh_masters()
    stochastic = optimizer.bf16_stochastic_round and bucket.dtype == torch.bfloat16
    if backend == "triton":
        _by_kernel(optimizer, bucket, grads, hyper, factor, found_inf, stochastic)
    elif backend == "formula" or stochastic:
        bucket.count(1)
        _by_formula(optimizer, bucket, grads, hyper, factor, stochastic)
    else:
        bucket.count(1)
        multiplier = 1.0 if factor is None else factor.item()
        if bucket.rounded is None:
            optimizer._aten(group, bucket, grads, hyper, multiplier)
        else:
            optimizer._aten(group, bucket, [g.float() for g in grads], hyper, multiplier)
            torch._foreach_copy_(bucket.rounded, bucket.updated)
    bucket.fresh = False
    bucket.note_versions()


def _hyperparameters(names: tuple[str, ...], group: Group) -> dict[str, Any]:
    """A group's hyperparameters of these names, with tensors as numbers."""
    found = {}
    for name in names:
        value = group[name]
        found[name] = value if type(value) in (float, bool) else _as_float(value)
    return found


def _as_float(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _by_kernel(
    optimizer: MultiTensor,
    bucket: Bucket,
    grads: list[Tensor],
    hyper: dict[str, Any],
    factor: Tensor | None,
    found_inf: Tensor | None,
    stochastic: bool,
) -> None:
    if found_inf is not None:
        found_inf = found_inf.to(bucket.device, non_blocking=True)
    bucket.count(1 if found_inf is None else 1 - found_inf)
    if factor is not None:
        dtype = torch.float64 if bucket.dtype == torch.float64 else torch.float32
        factor = factor.to(bucket.device, dtype, non_blocking=True)
    rule = optimizer._rule
    kernels("optim").update(
        rule.name, bucket.table(rule.slots), grads, bucket.steps, hyper,
        scale=factor, found_inf=found_inf, fresh=bucket.fresh and bool(hyper.get("dampening")),
        seed=int(torch.randint(2**40, (), device="cpu")) if stochastic else None,
    )  # fmt: skip


def _by_formula(
    optimizer: MultiTensor,
    bucket: Bucket,
    grads: list[Tensor],
    hyper: dict[str, Any],
    factor: Tensor | None,
    stochastic: bool,
) -> None:
    rule = optimizer._rule
    for i, (p, g) in enumerate(zip(bucket.updated, grads, strict=True)):
        given = {
            name: widen(bucket.states[name][i]) for name in rule.slots if name in bucket.states
        }
        if rule.counts_steps:
            given["t"] = bucket.states["step"][i].item()
        if bucket.fresh:
            given["fresh"] = True
        g = widen(g.view(-1))
        g = g if factor is None else g * factor.to(g.device)
        new, states = rule.formula(widen(p), g, **given, **hyper)
        if bucket.rounded is not None:
            bucket.rounded[i].copy_(new)
        if stochastic:
            new = stochastically_rounded(new, torch.randint_like(new, 2**16, dtype=torch.int32))
        p.copy_(new)
        for name, state in states.items():
            bucket.states[name][i].copy_(state)


def by_torch(
    optimizer: MultiTensor, group: Group, params: list[Tensor], factor: Tensor | None
) -> None:
    """torch's own update of some parameters of a group."""
    groups, grads = optimizer.param_groups, [p.grad for p in params]
    attributes = optimizer.__dict__
    ours = ("grad_scale", "found_inf")
    scaler: dict[str, Any] = {n: attributes.pop(n) for n in ours if n in attributes}
    own = {**group, "params": params}
    if group.get("fused") and all(g is None or g.layout == torch.strided for g in grads):
        # torch's fused kernels assume that all tensors have the same strides (torch 2.13, on a CPU)
        own["fused"] = False
    optimizer.param_groups = [own]
    try:
        if factor is not None:
            by = factor if group.get("capturable") else factor.item()
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else g * by
        with away_from_the_default_device():
            torchs_step(optimizer)
    finally:
        optimizer.param_groups = groups
        attributes.update(scaler)
        if factor is not None:
            for p, g in zip(params, grads, strict=True):
                p.grad = g


def torchs_step(optimizer: MultiTensor, closure: Callable[[], Any] | None = None) -> Any:
    """One step by torch's class, without torch's wrapper, which calls hooks and the profiler."""
    step: Any = optimizer._torch.step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    return step(optimizer, closure)
