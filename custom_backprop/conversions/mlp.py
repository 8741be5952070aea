"""Gated MLPs of language models: f(gate) up, then down, in one Function where all three are plain
linear layers that nobody listens to. Else their modules are called one after another, and the gate
alone is ours.

Ours keeps the two products of the inner width, of which theirs keeps four tensors. In half
precision it rounds f(a) b once, theirs f(a) too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..backends.selection import is_autocast
from ..formulas import gating as formula
from ..nn.linear import listened_to, plain_linear
from . import probe
from .activation import activation_of
from .generated import subclass

#: the names of gate, up, down, activation and dropout in the classes of others
GATED = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("gate_proj", "up_proj", "down_proj", "act_fn", "dropout"),
    ("wi_0", "wi_1", "wo", "act", "dropout"),
)
#: the names of gate and up in one, down and activation
PACKED = (("gate_up_proj", "down_proj", "activation_fn"),)

#: activation -> the gate, the whole MLP and their options
GATES: dict[str | None, Any] = {
    "silu": (F.swiglu, F.swiglu_mlp, {}),
    "gelu": (F.geglu, F.geglu_mlp, {"approximate": "none"}),
    "gelu_tanh": (F.geglu, F.geglu_mlp, {"approximate": "tanh"}),
}


@dataclass(frozen=True)
class GatedMLP:
    """By :func:`custom_backprop.functional.swiglu_mlp` or ``geglu_mlp``, unless the activation has
    become another one or theirs would cast between the layers."""

    names: tuple[str, ...]

    def __call__(self, base: Any) -> dict[str, Any]:
        names = self.names

        @functools.wraps(base.forward)
        def forward(self, *args, **named):
            gate, up, down, act, *dropout = [getattr(self, n) for n in names]
            by = GATES.get(activation_of(act))
            if by is None or named or len(args) != 1 or not _casts_nothing(args[0], down, names):
                return base.forward(self, *args, **named)
            (x,), (function, whole, options) = args, by
            if plain_linear(gate, up, down) and all(map(_idle, dropout)):
                biases = {"gate_bias": gate.bias, "up_bias": up.bias, "down_bias": down.bias}
                return whole(x, gate.weight, up.weight, down.weight, **biases, **options)
            hidden = function(gate(x), up(x), **options)
            for d in dropout:
                hidden = d(hidden)
            return down(hidden)

        return {"forward": forward}


@dataclass(frozen=True)
class PackedGatedMLP:
    """By :func:`custom_backprop.functional.swiglu` or ``geglu`` over the halves of one product,
    unless as in :class:`GatedMLP`."""

    names: tuple[str, ...]

    def __call__(self, base: Any) -> dict[str, Any]:
        names = self.names

        @functools.wraps(base.forward)
        def forward(self, *args, **named):
            gate_up, down, act = [getattr(self, n) for n in names]
            by = GATES.get(activation_of(act))
            if by is None or named or len(args) != 1:
                return base.forward(self, *args, **named)
            function, _, options = by
            return down(function(gate_up(args[0]), gate_first=True, **options))

        return {"forward": forward}


def _idle(dropout: torch.nn.Module) -> bool:
    """Whether it drops nothing, and nobody wants to hear of that."""
    drops = not isinstance(dropout, torch.nn.Dropout) or (dropout.training and dropout.p > 0)
    return not drops and not listened_to(dropout)


def _casts_nothing(x: Any, down: torch.nn.Module, names: tuple[str, ...]) -> bool:
    """Whether theirs would not cast between the layers, as T5's does. The weight of a layer that is
    not plain is not looked at: a parametrization computes it anew, or more than that."""
    if not plain_linear(down):
        return names[2] != "wo"
    return x.dtype == down.weight.dtype or is_autocast(x)


def counterpart(module: torch.nn.Module) -> type | str | None:
    """The class of ours, why there is none, or None for what is no such MLP."""
    has = set(module._modules)
    for kind, layouts in ((GatedMLP, GATED), (PackedGatedMLP, PACKED)):
        for names in layouts:
            if has == set(names) and not module._parameters:
                return _of(module, kind, names)
    return None


def _of(module, kind, names):
    act = module._modules[names[2 if kind is PackedGatedMLP else 3]]
    name = activation_of(act)
    if name not in GATES:
        return f"no gate of ours has the activation {type(act).__name__}"
    if all(_agree(module, kind, names, act, name, dtype) for dtype, _ in probe.SAME):
        cls: Any = type(module)
        return subclass(cls, kind(names))
    return "a gated MLP by its layers, but computes something else"


def _agree(module, kind, names, act, name, dtype):
    where = {"device": probe.device_of(module), "dtype": dtype}
    width, hidden = 8, 16
    x = probe.numbers(3, width, **where)
    a, b, c = (
        probe.linear(hidden, width, 1, **where),
        probe.linear(hidden, width, 2, **where),
        probe.linear(width, hidden, 3, **where),
    )
    if kind is PackedGatedMLP:
        both = probe.linear(2 * hidden, width, 1, **where)
        halves = both.weight.detach().chunk(2)
        a.weight, b.weight = (torch.nn.Parameter(h) for h in halves)
        parts = [both, c, act]
    else:
        parts = [a, b, c, act, _Doubled()][: len(names)]
    theirs = probe.bare(module, **dict(zip(names, parts, strict=True)))

    def ours():
        hidden = formula.gate(a(x), b(x), 0, True, name)
        return c(hidden * 2 if len(names) == 5 else hidden)

    return probe.agree(lambda: theirs(x), ours)


class _Doubled(torch.nn.Module):
    """Stands for a dropout, and shows where it is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x
