"""The gradients of a model as this rank sees them, whatever wraps it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.parallel import DistributedDataParallel

from ..dtensor import is_dtensor, local
from .outputs import LAYERS
from .sums import wide_of


class Gradient(NamedTuple):
    """One parameter's gradient.

    Attributes:
        row: that of the module that has the parameter.
        value: this rank's shard.
        share: its weight in a sum over the ranks.
        by_unit: whether each of its rows belongs to one output unit.
    """

    row: int
    parameter: nn.Parameter
    value: Tensor
    share: float
    by_unit: bool


def with_gradients(modules: Sequence[nn.Module]) -> list[tuple[int, str, nn.Parameter]]:
    """(row, name, parameter) of all parameters with a gradient. A shared one occurs once."""
    found: dict[int, tuple[int, str, nn.Parameter]] = {}
    for row, module in enumerate(modules):
        for name, p in module._parameters.items():
            if p is not None and p.grad is not None:
                found.setdefault(id(p), (row, name, p))
    return list(found.values())


def gradients(
    modules: Sequence[nn.Module],
    names: Sequence[str],
    found: list[tuple[int, str, nn.Parameter]],
    mesh: Any,
) -> Iterator[Gradient]:
    """The gradients that :func:`with_gradients` found.

    Raises:
        RuntimeError: a gradient is a sum that is not complete yet.
    """
    for row, name, p in found:
        share, by_unit = 1.0, False
        if isinstance(modules[row], tuple(LAYERS)):
            by_unit = name in ("weight", "bias")
        if mesh is not None:
            placements = getattr(p.grad, "placements", ())
            if any(at.is_partial() for at in placements):
                raise RuntimeError(
                    f"the gradient of {names[row]!r} is not all-reduced yet "
                    f"(DTensor placements {placements})"
                )
            shards = {d: at for d, at in enumerate(placements) if at.is_shard()}
            share = 1 / math.prod(n for d, n in enumerate(mesh.shape) if d not in shards)
            by_unit &= all(at.is_shard(0) for at in shards.values())
        yield Gradient(row, p, local(p.grad), share, by_unit)


def mesh_of(parameters: list[Any]) -> Any:
    """The mesh of the DTensor parameters, or None if there are none.

    Raises:
        RuntimeError: there are several meshes.
    """
    meshes = {p.device_mesh for p in parameters if is_dtensor(p)}
    if len(meshes) > 1:
        raise RuntimeError(
            f"the parameters are on {len(meshes)} device meshes: give each part its own monitor"
        )
    return next(iter(meshes), None)


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside DDP and torch.compile, and whether any part of it is compiled.

    Raises:
        RuntimeError: the wrapper hides the layers' gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise RuntimeError(
                "nn.DataParallel runs copies of the modules in threads, out of sight of a monitor: "
                "use DistributedDataParallel"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                "FSDP1 flattens the layers' parameters into one: use fully_shard (FSDP2)"
            )
    compiled = any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
    )
    while hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
        name = "module" if isinstance(model, DistributedDataParallel) else "_orig_mod"
        model = getattr(model, name)
    return model, compiled


def inverse_scale(scaler: GradScaler | None) -> Tensor | None:
    """1 / the scaler's scale, while gradients are multiplied by it: the scaler is enabled, and
    unscale_() was not called yet in this step."""
    if scaler is None or not scaler.is_enabled():
        return None
    states = scaler._per_optimizer_states.values()
    if any(state["stage"] is OptState.UNSCALED for state in states):
        return None
    scale = scaler._get_scale_async()
    return None if scale is None else scale.to(wide_of(scale)).reciprocal()
