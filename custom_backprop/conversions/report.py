"""What :func:`custom_backprop.convert` swapped in a model, and what it left and why."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import NO_COUNTERPART, theirs_of
from .convert import LEFT, Plan, convert, plan_of, revert
from .fusions import CHOSEN, FUSIONS, Fusion, fusions_of
from .generated import made_of
from .patch import is_patched
from .probe import device_of

__all__ = ["ConversionReport", "Layer", "conversion_report"]


@dataclass
class Layer:
    """One module, or one loss function that the model calls: its class before, ours or why it was
    left, and the bytes that its forward saves for backward, before and now (None without
    inputs)."""

    name: str
    theirs: str
    ours: str | None = None
    reason: str | None = None
    saved_before: int | None = None
    saved: int | None = None


@dataclass
class ConversionReport:
    """What :func:`conversion_report` found. Prints as a table, in which layers of the same kind
    and result share a line. The loss functions are known only with inputs."""

    model: str
    device: str
    functions: bool
    layers: list[Layer]
    fusions: list[Fusion]
    losses: list[Layer] = field(default_factory=list)

    @property
    def swapped(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.ours is not None]

    @property
    def left(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.ours is None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        both = [*self.layers, *self.losses]
        measured = any(layer.saved is not None for layer in both)
        groups: dict[tuple[str, str, str], list[Layer]] = {}
        for layer in both:
            name = _starred(layer.name)
            result = f"-> {layer.ours}" if layer.ours else f"left: {layer.reason}"
            groups.setdefault((name, layer.theirs, result), []).append(layer)
        rows = [("", "layer", "class", "") + ("KiB saved", "before") * measured]
        for (name, theirs, result), layers in groups.items():
            sums = [sum(getattr(x, f) or 0 for x in layers) for f in ("saved", "saved_before")]
            figures = tuple(f"{n / 1024:.1f}" for n in sums) * measured
            rows.append((f"{len(layers)}", name, theirs, result, *figures))
        if measured:
            sums = [sum(getattr(x, f) or 0 for x in both) for f in ("saved", "saved_before")]
            rows.append(("", "total", "", "", *(f"{n / 1024:.1f}" for n in sums)))
        if self.fusions:
            rows.append(("", "block", "neighbours", "") + ("", "") * measured)
        for key, count in Counter(map(_line, self.fusions)).items():
            rows.append((f"{count}", *key) + ("", "") * measured)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if 1 <= i <= 3 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        by = "ours" if self.functions else "torch's"
        title = f"{self.model} on {self.device}: {len(self.swapped)} layers swapped, "
        return "\n".join([f"{title}{len(self.left)} left; functions: {by}", *lines])


def conversion_report(model: torch.nn.Module, *inputs: Any, **keywords: Any) -> ConversionReport:
    """What stands for what in a converted model; of a model that is not converted, what
    ``convert(model)`` would do. Containers, which compute nothing themselves as far as we know, are
    not listed.

    Args:
        model: a module.
        inputs, keywords: those of a call of ``model`` in training, with the labels if it computes
            its loss itself. With them the bytes that one forward saves for backward are measured,
            as :mod:`custom_backprop.cost` does, of a copy before and after conversion. The loss
            functions are listed, too. One that is fused with its head saves the gradients that it
            has made already, those of the head's input and weight, and no logits.

    Raises:
        TypeError: ``model`` is not a module.
    """
    plan = plan_of(model)
    chosen = vars(model).get(LEFT)
    if chosen is not None:
        plan = {m: (n, chosen.get(n[0], answer)) for m, (n, answer) in plan.items()}
    names = frozenset(FUSIONS) if chosen is None else None
    report = of_plan(model, plan, is_patched(model) or chosen is None, names)
    if inputs or keywords:
        _measure(report, model, inputs, keywords)
    return report


def _starred(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "(model)"


def _line(fusion: Fusion) -> tuple[str, str, str]:
    result = f"left: {fusion.reason}" if fusion.reason else f"-> {fusion.op}"
    return _starred(fusion.block), " + ".join(fusion.parts), result


def of_plan(
    model: torch.nn.Module, plan: Plan, functions: bool, fusions: frozenset[str] | None
) -> ConversionReport:
    """The report of what a plan says, with the fusions of these names (None: that are there)."""
    layers = []
    for module, (names, answer) in plan.items():
        theirs = theirs_of(type(module)).__name__
        if isinstance(answer, type):
            layers.append(Layer(names[0], theirs, _described(answer)))
        elif not any(True for _ in module.children()) or answer not in NO_NEWS:
            layers.append(Layer(names[0], theirs, reason=answer))
    name, device = theirs_of(type(model)).__name__, device_of(model).type
    found = [f for here in fusions_of(plan, device, fusions).values() for f in here]
    return ConversionReport(name, device, functions, layers, found)


#: what is not worth a line of a container
NO_NEWS = (NO_COUNTERPART, *CHOSEN)


def _described(ours: type) -> str:
    made = made_of(ours)
    if made is None:
        return f"{ours.__module__.split('.')[0]}.{ours.__name__}"
    return str(getattr(made[1], "__name__", None) or type(made[1]).__name__)


def _measure(report: ConversionReport, model: Any, inputs: Any, keywords: Any) -> None:
    from ..cost.measuring import saved_by  # imported when it is asked for
    from ..cost.report import MODEL

    converted = model if LEFT in vars(model) else convert(copy.deepcopy(model))
    before, losses = saved_by(revert(copy.deepcopy(model)), inputs, keywords)
    now, ours = saved_by(converted, inputs, keywords)
    known = {layer.name or MODEL: layer for layer in report.layers}
    for name in before:
        if name not in known and (before[name] or now[name]):
            kind = type(model.get_submodule("" if name == MODEL else name)).__name__
            known[name] = Layer(name, kind, reason="the functions that it calls")
            report.layers.append(known[name])
        if name in known:
            known[name].saved_before, known[name].saved = before[name], now[name]
    left = "gains nothing here" if report.functions else "functions are torch's"
    for name, loss in losses.items():
        its = ours[name]
        by = None if its.ours is None else f"custom_backprop.{its.ours}"
        reason = None if by else left
        report.losses.append(Layer(f"{name}()", "function", by, reason, loss.saved, its.saved))
