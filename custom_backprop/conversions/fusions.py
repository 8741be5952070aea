"""Neighbours that :func:`custom_backprop.convert` runs as one op: where they are in a model, and
why some are left.

A fusion changes the class of the block around its parts, and of no part. So the parts keep their
names, hooks and results, and are called one after another whenever something is not as it was: see
:mod:`custom_backprop.conversions.joined`. A ``torch.nn.Sequential`` is such a block, and so are
those of :mod:`custom_backprop.conversions.blocks`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import nn
from ..nn.linear import Linear, listened_to
from . import theirs_of
from .blocks import KNOWN, Block, is_known, looks_like
from .generated import made_of, subclass
from .joined import is_activation, linear_activation, op_of_norm, takes

#: the answers of a plan that the user chose
CHOSEN = EXCLUDED, NOT_INCLUDED = "excluded", "not included"
#: what may be switched on and off
FUSIONS = ("linear_activation", "add_norm", "dropout_add")


@dataclass
class Fusion:
    """Modules of a block that are run as one op, or could be.

    Attributes:
        name: one of :data:`FUSIONS`.
        block: the name of the block.
        parts: the names in it of the modules that are not called.
        op: of :mod:`custom_backprop.functional`.
        reason: why they are called one after another. Hooks, no dropout, and a device on which
            nothing is gained do so for as long as they are there: the fusion is made.
        made: whether the block has the class for it, or will get it.
    """

    name: str
    block: str
    parts: tuple[str, ...]
    op: str
    reason: str | None = None
    made: bool = True


_NOTHING: tuple[str, Any] = ("", None)


@dataclass(frozen=True)
class Fused:
    """Of the class of a ``Sequential``, the subclass that runs linear layers of these names and the
    activations after them in one."""

    layers: frozenset[str]

    def __call__(self, base: Any) -> dict[str, Any]:
        layers = self.layers

        @functools.wraps(base.forward)
        def forward(self, input):
            modules = iter(self._modules.items())
            for name, module in modules:
                _, following = next(modules, _NOTHING) if name in layers else _NOTHING
                if following is None:
                    input = module(input)
                else:
                    input = linear_activation(module, following, input)
            return input

        return {"forward": forward}


def chosen(fusions: bool | str | Sequence[str]) -> frozenset[str]:
    """The names that ``fusions=`` of convert says.

    Raises:
        ValueError: there is no fusion of that name.
        TypeError: it is neither a name nor a sequence of names.
    """
    if isinstance(fusions, bool):
        return frozenset(FUSIONS if fusions else ())
    names = [fusions] if isinstance(fusions, str) else fusions
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise TypeError(f"convert: fusions takes a bool or names, got {type(fusions).__name__}")
    if unknown := [n for n in names if n not in FUSIONS]:
        raise ValueError(f"convert: no fusion {unknown[0]!r}: choose of {', '.join(FUSIONS)}")
    return frozenset(names)


def unfused(cls: Any) -> Any:
    """The class that a block had before its fusions."""
    made = made_of(cls)
    return made[0] if made is not None and isinstance(made[1], (Block, Fused)) else cls


def fusions_of(
    plan: Mapping[torch.nn.Module, tuple[list[str], type | str]],
    device: str,
    names: frozenset[str] | None,
) -> dict[torch.nn.Module, list[Fusion]]:
    """Of each block in which there are fusions, all of them.

    Args:
        plan: of convert: module -> its names, and the class that it is to have or why it stays.
        device: where the model is.
        names: those that are on; None of a model that is converted, whose classes say it.
    """
    found = {}
    for module, (given, answer) in plan.items():
        if isinstance(answer, type):  # swapped as a whole
            continue
        here = [*_in_sequential(module, plan), *_in_block(module, plan)]
        for fusion in here:
            fusion.block = given[0]
            _decide(fusion, module, answer, device, names)
        if here:
            found[module] = here
    return found


def fused(module: torch.nn.Module, fusions: list[Fusion]) -> type:
    """The class that a block is to have for the fusions of it that are made."""
    base, made = unfused(type(module)), [f for f in fusions if f.made]
    if not made:
        return base
    if base is torch.nn.Sequential:
        return subclass(base, Fused(frozenset(f.parts[0] for f in made)))
    kind = looks_like(set(module._modules))
    assert kind is not None
    return subclass(base, Block(kind, frozenset(f.name for f in made)))


def _in_sequential(module, plan) -> Iterator[Fusion]:
    if theirs_of(type(module)) is not torch.nn.Sequential:
        return
    children = list(module._modules.items())
    for (name, layer), (following, activation) in itertools.pairwise(children):
        if _class_of(layer, plan) in (torch.nn.Linear, Linear) and is_activation(activation):
            why = _why_chosen(module, (name, following), plan)
            yield _fusion("linear_activation", (name, following), "linear_activation", why)


def _in_block(module, plan) -> Iterator[Fusion]:
    kind = looks_like(set(module._modules))
    if kind is None:
        return
    known = is_known(theirs_of(type(module)), kind)
    for name, parts in KNOWN[kind].fusions:
        op, why = _op_of(name, [_class_of(getattr(module, p), plan) for p in parts])
        why = why or _why_chosen(module, parts, plan)
        if not known:
            why = "its forward is not one that is known here"
        elif name == "linear_activation" and not is_activation(getattr(module, parts[1])):
            why = why or f"no op has the activation of {parts[1]}"
        yield _fusion(name, parts, op, why)


def _fusion(name, parts, op, why):
    return Fusion(name, "", parts, op, why, why is None)


def _op_of(name, classes):
    """The op for parts of these classes, and why not."""
    if name == "dropout_add":
        ours = classes[0] is nn.Dropout
        return name, None if ours else "the dropout is not ours, and draws another mask"
    if name == "add_norm":
        op = op_of_norm(classes[0])
        return op or name, None if op else f"no op for the norm {classes[0].__name__}"
    plain = classes[0] in (torch.nn.Linear, Linear)
    return name, None if plain else f"{classes[0].__name__} is not a linear layer of torch"


def _decide(fusion, module, answer, device, names):
    """Fills in the reasons that depend on the choice of the user and on the moment."""
    if names is None:
        on = _is_made(fusion, type(module))
        left = answer if answer in CHOSEN else "switched off"
        fusion.reason = None if on else fusion.reason or left
    else:
        on = fusion.reason is None
        if on and "forward" in vars(module):
            on, fusion.reason = False, "its forward was replaced"
        elif answer in CHOSEN:
            on, fusion.reason = _is_made(fusion, type(module)), fusion.reason or answer
        elif on and fusion.name not in names:
            on, fusion.reason = False, "switched off"
    fusion.made = on
    if on:
        fusion.reason = _now(fusion, module, device)


def _is_made(fusion, cls):
    while (made := made_of(cls)) is not None:
        cls, members = made
        if isinstance(members, Block):
            return fusion.name in members.on
        if isinstance(members, Fused):
            return fusion.parts[0] in members.layers
    return False


def _now(fusion, module, device):
    """Why a fusion that is made does nothing as things are."""
    parts = {p: getattr(module, p) for p in fusion.parts}
    if "forward" in vars(module):
        return "its forward was replaced"
    if heard := [p for p, m in parts.items() if listened_to(m)]:
        return f"somebody hears of {heard[0]}"
    if fusion.name == "dropout_add" and not parts[fusion.parts[0]].p:
        return "it drops nothing: p = 0"
    if not takes(fusion.op, device):
        return f"gains nothing on this device ({device})"
    return None


def _why_chosen(module, parts, plan):
    left = {p: plan[m][1] for p in parts if (m := getattr(module, p)) in plan}
    return next((f"{p}: {a}" for p, a in left.items() if a in CHOSEN), None)


def _class_of(module, plan):
    answer = plan[module][1] if module in plan else type(module)
    return answer if isinstance(answer, type) else type(module)
