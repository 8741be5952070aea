"""Swaps the ``torch.nn`` layers of an existing model for ours, and back.

Each of our modules is a subclass of torch's that overrides ``forward`` and nothing else, so a swap
is a change of class: parameters, buffers, hooks, names, the optimizer that refers to the
parameters, and every checkpoint stay what they are.
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
    """Makes every layer of ``model`` for which there is a drop-in ours, in place.

    Layers of exactly torch's class are swapped. A subclass (of yours, of a parametrization, of a
    sharding wrapper) has a ``forward`` of its
    own and is left as it is, and so is what a model calls as a function: use
    :mod:`custom_backprop.functional` there.

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
    lacks stay.

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
