"""Activations of ``transformers.activations`` of which an op of ours says the same function.

Ours rounds once. Where theirs is written out in several operators (NewGELU, say), half precision
differs by their roundings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..nn.linear import listened_to
from ..ops.activation import activations
from .generated import subclass

_THEIRS = {
    "AccurateGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "MishActivation": "mish",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu_squared",
    "SiLUActivation": "silu",
}
#: module and name of a class -> the activation; a generated class has the names of theirs
NAMES = {
    **{("transformers.activations", theirs): ours for theirs, ours in _THEIRS.items()},
    **{
        (module, name): ours
        for module in ("torch.nn.modules.activation", "custom_backprop.nn.activation")
        for name, ours in {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}.items()
    },
}


@dataclass(frozen=True)
class Activation:
    """By the function of :mod:`custom_backprop.functional` of that name."""

    function: str

    def __call__(self, base: Any) -> dict[str, Any]:
        function = activations[self.function]

        @functools.wraps(base.forward)
        def forward(self, *args, **named):
            if named or len(args) != 1:
                return base.forward(self, *args, **named)
            return function(args[0])

        return {"forward": forward}


def activation_of(module: torch.nn.Module) -> str | None:
    """The name of the activation that a module computes, if it is known and nobody listens."""
    cls: Any = type(module)
    if listened_to(module):
        return None
    name = NAMES.get((cls.__module__, cls.__qualname__))
    return "gelu_tanh" if getattr(module, "approximate", None) == "tanh" else name


def counterpart(module: torch.nn.Module) -> type | str | None:
    """The class of ours, or None for any other."""
    cls: Any = type(module)
    if cls.__module__ != "transformers.activations" or cls.__qualname__ not in _THEIRS:
        return None
    return subclass(cls, Activation(_THEIRS[cls.__qualname__]))
