"""What is measured together: one call by all who offer it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor

from custom_backprop.testing import Make, OpSpec, Sample
from custom_backprop.testing.case import is_float, outputs

from .device import Call, Card, Timed
from .results import Row

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """A case.

    Attributes:
        row: its rows, but for the figures.
        work: makes them.
        part: what tells it from other cases of the same row.
        timed: whether it wants the card alone.
        first: calls once what is timed, so that it is compiled.
    """

    row: Row
    work: Callable[[], Iterable[Row]]
    part: str = ""
    timed: bool = True
    first: Callable[[], object] | None = None

    @property
    def key(self) -> str:
        parts = self.row.section, self.row.op, self.row.dtype, self.row.n, self.part
        return "/".join(str(part) for part in parts if part)


class Inputs:
    """A sample, and gradients of what the op returns."""

    def __init__(self, spec: OpSpec, sample: Sample) -> None:
        self.sample = sample
        self.leaves = [a for a in sample.args if is_float(a) and a.requires_grad]
        self.detached = [a.detach() if isinstance(a, Tensor) else a for a in sample.args]
        with torch.no_grad():
            results = outputs(spec.function(*self.detached, **sample.kwargs))
        self.is_loss = results[0].dim() == 0
        self.dys = [torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in results]

    def forward(self, function: Call) -> Any:
        return function(*self.detached, **self.sample.kwargs)

    def results(self, function: Call) -> tuple[Tensor, ...]:
        return outputs(function(*self.sample.args, **self.sample.kwargs))

    def gradients(self, results: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, self.leaves, self.dys, **options)

    def both(self, function: Call) -> list[Tensor]:
        results = self.results(function)
        return [*results, *self.gradients(results)]


def sample_of(
    spec: OpSpec, make: Make, rows: int | None, n: int | None, size: str, *, seeded: bool = False
) -> Sample:
    """Of rows of n numbers, or of a size. A seed is drawn at each call, as in training, unless
    ``seeded``."""
    if n is None or rows is None or spec.by_length is None:
        sample = spec.large(make, size)
    else:
        sample = spec.by_length(make, rows, n)
    if not seeded:
        sample.kwargs.pop("seed", None)
    return sample


def inputs_of(
    spec: OpSpec, device: Card, dtype: torch.dtype, rows: int | None, n: int | None, size: str,
    most: int = 8,
) -> list[Inputs]:  # fmt: skip
    """So many inputs that together they are four times as large as the cache; ``most`` at most."""
    found: list[Inputs] = []
    there = device.kind == "cuda"
    for seed in count():
        sample = sample_of(spec, Make(device.kind, dtype, seed, there=there), rows, n, size)
        found.append(Inputs(spec, sample))
        of_one = sum(a.nbytes for a in sample.args if isinstance(a, Tensor))
        if len(found) == most or len(found) * of_one >= 4 * device.cache:
            return found
    raise AssertionError


def timed(function: Call, inputs: Sequence[Inputs], direction: str) -> Timed:
    """A call, and what gives it the next inputs. Forward wants no gradient. Backward has graphs
    that are retained."""
    if direction != BACKWARD:
        call = Inputs.forward if direction == FORWARD else Inputs.both
        turns = cycle((given, function) for given in inputs)
        return call, lambda: next(turns)
    made: list[tuple[Inputs, tuple[Tensor, ...]]] = []
    which = cycle(range(len(inputs)))

    def prepare() -> tuple[Any, ...]:
        i = next(which)
        if i == len(made):
            made.append((inputs[i], inputs[i].results(function)))
        return made[i]

    return (lambda given, results: given.gradients(results, retain_graph=True)), prepare
