"""Swaps the layers of an existing model for ours, and back.

A swap changes the class of a module and nothing else: each of our classes is a subclass of theirs
that overrides only ``forward``. Parameters, buffers, hooks and names stay, an optimizer still
refers to the same parameters, and checkpoints load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch

from . import DROP_INS, counterpart, is_ours, theirs_of
from .fusions import (
    CHOSEN,
    EXCLUDED,
    NOT_INCLUDED,
    chosen,
    fused,
    fusions_of,
    unfused,
)
from .patch import is_patched, patch, unpatch, unpatched
from .probe import device_of

Model = TypeVar("Model", bound=torch.nn.Module)

#: module -> its names, and the class of ours or the reason why there is none
Plan = dict[torch.nn.Module, tuple[list[str], type | str]]

#: the attribute of a converted model that says what was left by choice, name by name
LEFT = "_left_by_convert"

#: a pattern of names, a class, or a question asked of (name, module)
Rule = str | type | Callable[[str, torch.nn.Module], bool]
Rules = Rule | Sequence[Rule] | None


def convert(
    model: Model,
    include: Rules = None,
    exclude: Rules = None,
    functions: bool = True,
    fusions: bool | str | Sequence[str] = True,
    dry_run: bool = False,
) -> Model:
    """Replaces every layer of ``model`` that has a counterpart here, in place.

    Those are the layers of ``torch.nn``; of Hugging Face models the RMS norms, gated MLPs,
    activations and ``Conv1D``; and what :func:`register_conversion` was told. Only exact classes
    are swapped: a subclass with a ``forward`` of its own stays, and so does a module that was given
    another ``forward``. What loses time on the model's device stays too, unless ``include`` names
    it: its class here says so (``loses_on_a_cpu``). :func:`custom_backprop.conversion_report`
    says what was swapped, and what was left and why.

    Results are equal to rounding. Half precision differs where theirs rounds between the operators
    of one layer and ours at the end; and the drawn masks of dropout differ.

    Args:
        model: a module, possibly itself such a layer.
        include: swap only what one of these says: a pattern of names as in
            :mod:`fnmatch` (``"model.layers.*.mlp"``; * also stands for dots), a class, or a
            function of (name, module). One or a sequence of them.
        exclude: leave what one of these says, in the same forms.
        functions: whether the functions of ``torch.nn.functional`` that the model calls are ours
            too, by :func:`custom_backprop.patch`. Not where the model's own ``forward`` was
            replaced, nor of a model that is one layer.
        fusions: whether neighbours in a ``torch.nn.Sequential`` and in known blocks of Hugging Face
            run as one op while nobody hears of their calls; or the names of those that do:
            "linear_activation", "add_norm", "dropout_add". See
            :mod:`custom_backprop.conversions.fusions`.
        dry_run: whether to print what would be swapped, and change nothing.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is not a module, or a rule or ``fusions`` is nothing of the above.
        ValueError: a pattern or a class fits no module of the model, or no fusion has that name.
    """
    from .report import of_plan  # which imports this module

    names = chosen(fusions)
    plan = plan_of(model, include, exclude)
    if dry_run:
        print(of_plan(model, plan, functions, names))
        return model
    functions = functions or is_patched(model)
    unpatch(model)  # what it put over a class of theirs hides it
    for module, (_, answer) in plan.items():
        if isinstance(answer, type):
            module.__class__ = answer
    for module, found in fusions_of(plan, device_of(model).type, names).items():
        module.__class__ = fused(module, found)
    if functions and type(model) not in DROP_INS.values() and "forward" not in vars(model):
        patch(model)
    left = {n[0]: why for n, why in plan.values() if why in CHOSEN}
    vars(model)[LEFT] = {**vars(model).get(LEFT, {}), **left}
    return model


def revert(model: Model) -> Model:
    """The opposite of :func:`convert`: every module has its former class again. A layer that was
    made as ours becomes torch's; those that torch does not have stay.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    vars(model).pop(LEFT, None)
    for module in model.modules():
        module.__class__ = theirs_of(type(module))
    return model


def register_conversion(theirs: type, ours: type) -> None:
    """Makes :func:`convert` swap modules of exactly the class ``theirs`` for ``ours``.

    Args:
        theirs: a subclass of ``torch.nn.Module``.
        ours: a subclass of ``theirs`` that overrides methods and needs no attributes of its own.

    Raises:
        TypeError: they are not such classes.
        ValueError: there is another counterpart of ``theirs`` already, or ``ours`` stands for
            another class.
    """
    if not (isinstance(theirs, type) and issubclass(theirs, torch.nn.Module)):
        raise TypeError(f"expected a subclass of torch.nn.Module, got {theirs!r}")
    if not (isinstance(ours, type) and issubclass(ours, theirs) and ours is not theirs):
        raise TypeError(f"expected a subclass of {theirs.__name__}, got {ours!r}")
    known = DROP_INS.get(theirs, ours)
    if known is not ours:
        raise ValueError(f"{theirs.__name__} has a counterpart already: {known.__name__}")
    if theirs_of(ours) not in (ours, theirs):
        raise ValueError(f"{ours.__name__} stands for {theirs_of(ours).__name__} already")
    DROP_INS[theirs] = ours


def plan_of(model: torch.nn.Module, include: Rules = None, exclude: Rules = None) -> Plan:
    """Each module once, with all its names, and the class of ours that it is to have; or why none.

    Raises:
        TypeError, ValueError: as :func:`convert`.
    """
    _check(model)
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    included = _chosen("include", include, names)
    excluded = _chosen("exclude", exclude, names)
    device = device_of(model).type
    plan: Plan = {}
    for module, given in names.items():
        cls = unfused(unpatched(type(module)))
        if is_ours(cls):
            plan[module] = given, cls
        elif module in excluded:
            plan[module] = given, EXCLUDED
        elif include is not None and module not in included:
            plan[module] = given, NOT_INCLUDED
        else:
            loss = None if include is not None else _why_it_loses(cls, device)
            plan[module] = given, loss or counterpart(module, cls)
    return plan


def _why_it_loses(cls: type, device: str) -> str | None:
    """In words, why this class is left on that device; None for most. ``loses_on_a_cpu`` of ours is
    stock's time over ours, forward and backward, at the large size of ``python -m
    benchmarks.report`` (benchmarks/results), where the microseconds of a call no longer count; of
    batch norms, in a step of the ResNet of ``python -m benchmarks.models``. It is there where ours
    takes a fifth more time or worse, or slows a whole model, and saves no memory."""
    ratio = getattr(DROP_INS.get(cls), "loses_on_a_cpu", None) if device == "cpu" else None
    return None if ratio is None else f"loses on this device ({device}): {ratio:.2f}x"


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _chosen(which: str, rules: Any, names: dict[torch.nn.Module, list[str]]) -> set[Any]:
    """The modules that one of the rules fits."""
    if rules is None:
        return set()
    chosen = set()
    for rule in rules if isinstance(rules, (list, tuple, set, frozenset)) else [rules]:
        if isinstance(rule, torch.nn.Module) or not (isinstance(rule, str) or callable(rule)):
            raise TypeError(
                f"convert: {which} takes patterns of names, classes and functions of (name, "
                f"module), got {type(rule).__name__}"
            )
        fits = {m for m, all_names in names.items() if any(_fits(rule, n, m) for n in all_names)}
        if not fits and isinstance(rule, (str, type)):
            raise ValueError(f"convert: {which}={rule!r} fits no module of the model")
        chosen |= fits
    return chosen


def _fits(rule: Any, name: str, module: torch.nn.Module) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule)
    return isinstance(module, rule) if isinstance(rule, type) else bool(rule(name, module))
