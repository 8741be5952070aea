"""Runs forward and backward, and counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..conversions.convert import convert, revert
from .operators import Counter, tensors
from .report import Cost, CostReport
from .saved import Function, Losses, count_saved
from .where import Where


def cost(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    targets: Sequence[Any] = (),
    name: str | None = None,
) -> CostReport:
    """The cost of ``model`` with torch's layers and with ours: what :func:`custom_backprop.revert`
    and :func:`custom_backprop.convert` make of a copy. The model itself is left as it is. Without
    fusions, which count for the block around them: each layer is to have figures of its own.

    Args:
        model, inputs, loss, targets: as in :func:`measure`.
        name: the report's title. Default: the model's class.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in the result requires grad.
    """
    changes: list[Any] = [revert, partial(convert, fusions=False)]
    sides = [_measure(*_copied(model, inputs, loss, targets, change)) for change in changes]
    device = tensors([inputs, list(model.parameters())])[0].device.type
    return CostReport(name or type(model).__name__, device, *sides)


def measure(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    targets: Sequence[Any] = (),
) -> Cost:
    """The cost of one forward and one backward of ``model`` as it is. They run on a copy, twice
    forward and once backward.

    What a checkpoint computes again counts as backward's. Backward of a reentrant one is nobody's:
    it stands under "(outside)".

    Args:
        model: a module, on any device; on "meta" nothing is computed and nothing allocated.
        inputs: its positional arguments.
        loss: called as ``loss(output, *targets)``. A module's cost stands under "(loss)", a
            function's under "(outside)". Default: none, and backward starts with ones at every
            output that requires grad.
        targets: see ``loss``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in the result requires grad.
    """
    return _measure(*_copied(model, inputs, loss, targets, lambda module: module))


def _copied(
    model: nn.Module, inputs: Any, loss: Any, targets: Any, change: Callable[[Any], Any]
) -> tuple[Any, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model, loss = copy.deepcopy((model, loss))  # together: what they share stays shared
    inputs, targets = tree_map_only(
        Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (inputs, targets)
    )
    return change(model), inputs, change(loss) if isinstance(loss, nn.Module) else loss, targets


def _measure(
    model: nn.Module, inputs: Sequence[Any], loss: Callable[..., Any] | None, targets: Sequence[Any]
) -> Cost:
    where = Where(model, loss)

    def forward() -> list[Tensor]:
        output = model(*inputs)
        output = output if loss is None else loss(output, *targets)
        return [t for t in tensors(output) if t.requires_grad]

    with where.hears():
        with count_saved(model, where):
            found = forward()
        if not found:
            raise ValueError("nothing to differentiate: no output requires grad")
        del found
        with Counter(where) as counter:
            roots = forward()
        ones = [torch.ones_like(root) for root in roots]
        with counter:
            torch.autograd.backward(roots, ones)
    return Cost(list(where.layers.values()))


def saved_by(
    model: nn.Module, inputs: Sequence[Any] = (), keywords: dict[str, Any] | None = None
) -> tuple[dict[str, int], dict[str, Function]]:
    """What one forward of ``model`` saves for backward, layer by layer, as :func:`measure` counts
    it; and the loss functions that it calls, with what these save themselves. It runs on a copy."""
    model, inputs, _, keywords = _copied(model, inputs, None, keywords or {}, lambda m: m)
    where = Where(model, None)
    with where.hears(), count_saved(model, where), Losses(where) as losses:
        model(*inputs, **keywords)
    saved = {name: layer.saved_bytes for name, layer in where.layers.items()}
    return saved, {name: Function(f, saved.pop(name)) for name, f in losses.found.items()}
