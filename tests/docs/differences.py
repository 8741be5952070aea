"""The table of docs/differences.md: the inputs that may be changed in place between forward and
backward with stock, but not with ours. It is found by changing every tensor of every sample of the
database.

``python tests/docs/differences.py --write`` writes the table into the page.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_backprop.testing import Make, OpSpec, Sample, database
from custom_backprop.testing.case import outputs

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
START, END = "<!-- the table of inputs -->\n\n", "\n<!-- its end -->"

#: the gradients, or None if autograd raised
Gradients = list[Tensor | None] | None


def gradients_after_change(function: Callable[..., Any], sample: Sample, which: Any) -> Gradients:
    """The gradients of a call after its argument ``which`` was changed in place. None changes no
    argument."""
    given = {**dict(enumerate(sample.args)), **sample.kwargs}
    leaves = {
        name: t.detach().clone().requires_grad_(t.requires_grad)
        for name, t in given.items()
        if isinstance(t, Tensor)
    }
    # no leaves, which autograd does not allow to be changed
    call = given | {n: t * 1 if t.requires_grad else t for n, t in leaves.items()}
    positional = [call[i] for i in range(len(sample.args))]
    results = outputs(function(*positional, **{k: call[k] for k in sample.kwargs}))
    roots = [y for y in results if y.requires_grad]
    if which is not None:
        with torch.no_grad():
            changed = call[which]
            changed.mul_(0.5) if changed.is_floating_point() else changed.zero_()
    wanted = [t for t in leaves.values() if t.requires_grad]
    if not roots or not wanted:
        return []
    try:
        return list(torch.autograd.grad([y.sum() for y in roots], wanted, allow_unused=True))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


#: PyTorch's own function of each op that it has too
STOCK: dict[str, Callable[..., Any]] = {
    name: getattr(torch.nn.functional, name)
    for name in database()
    if hasattr(torch.nn.functional, name)
}


def changes(spec: OpSpec) -> Iterator[tuple[str, str, Gradients, Gradients, Gradients]]:
    """For each sample and each of its tensors: the names of the sample and of the argument, the
    gradients of stock and of ours after the change, and those of ours without the change."""
    names = list(inspect.signature(spec.function).parameters)
    for sample in spec.samples(Make("cpu", torch.float64)):
        tensors = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor)]
        tensors += [k for k, a in sample.kwargs.items() if isinstance(a, Tensor)]
        for which in tensors:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    stock = gradients_after_change(STOCK[spec.name], sample, which)
                except (TypeError, RuntimeError):  # stock has no such argument, or fails on it
                    stock = None
                ours = gradients_after_change(spec.function, sample, which)
                unchanged = gradients_after_change(spec.function, sample, None)
            name = names[which] if isinstance(which, int) else which
            yield sample.name, name, stock, ours, unchanged


def table() -> str:
    lines = ["| op | must not be changed before backward | where |", "|---|---|---|"]
    for spec in (database()[name] for name in STOCK):
        samples: set[str] = set()
        raised: dict[str, list[str]] = {}
        for sample, argument, stock, ours, _ in changes(spec):
            samples.add(sample)
            if stock is not None and ours is None:
                raised.setdefault(argument, []).append(sample)
        by_samples: dict[tuple[str, ...], list[str]] = {}
        for argument, found in raised.items():
            by_samples.setdefault(tuple(found), []).append(argument)
        for found, arguments in by_samples.items():
            where = "always" if set(found) == samples else "; ".join(dict.fromkeys(found))
            lines.append(f"| `{spec.name}` | {', '.join(arguments)} | {where} |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    """The table in the page."""
    return PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        head, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(head + START + table() + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(table(), end="")
