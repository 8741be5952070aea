"""Swaps the ``torch.nn`` layers of an existing model for ours, and back.

Each of our modules is a subclass of torch's that overrides only ``forward``, so a swap changes the
class and nothing else: parameters, buffers, hooks and names stay, an optimizer still refers to the
same parameters, and checkpoints load.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from . import nn

Model = TypeVar("Model", bound=torch.nn.Module)

#: torch's class -> ours
DROP_INS: dict[type, type] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}


def convert(model: Model) -> Model:
    """Replaces every layer of ``model`` that has a drop-in here, in place.

    Only layers of exactly torch's class are swapped. A subclass (yours, a parametrization's, a
    sharding wrapper's) has a ``forward`` of its own and is left alone. So are functions that a
    model calls: use :mod:`custom_backprop.functional` there.

    Args:
        model: a module, possibly itself such a layer.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return _swap(model, DROP_INS)


def revert(model: Model) -> Model:
    """The opposite of :func:`convert`: every drop-in becomes torch's class again. Layers that torch
    does not have stay.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return _swap(model, {ours: stock for stock, ours in DROP_INS.items()})


def _swap(model: Model, classes: dict[type, type]) -> Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
