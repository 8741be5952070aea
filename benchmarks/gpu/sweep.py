"""Each op: forward, backward and both, by the length of rows where its speed depends on it, against
stock, torch.compile and the peers.

All have inputs of their own with the same numbers: some peers overwrite what they get. Backward of
a loss alone is not timed, as the gradient is made in forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from custom_backprop.testing import OpSpec
from custom_backprop.testing.traffic import floors_of, saved_by

from ..measure import Timer
from .case import BACKWARD, BOTH, DIRECTIONS, FORWARD, Case, Inputs, inputs_of, timed
from .ceilings import Ceilings
from .device import Call, Card
from .peers import Peer
from .results import Row

SECTION = "sweep"
#: so many of the lengths are measured in float32, too, before the others are
MAIN = 6
#: a peer whose results and gradients are farther from stock's, relative to the largest number,
#: computes something else
TOLERANCE = 0.05


def cases(
    device: Card, specs: Sequence[OpSpec], peers: Sequence[Peer], ceilings: Callable[[], Ceilings]
) -> list[Case]:
    """The most important ones first: what is measured by rows, at the lengths of today's models in
    bfloat16, against stock and the peers. torch.compile is late, as it compiles for longer than all
    else takes; and not ahead, since Inductor would choose among kernels on a busy card."""
    found: list[tuple[tuple[int, bool, int], Case]] = []
    for spec in specs:
        others = {p.name: p.ops[spec.name] for p in peers if spec.name in p.ops}
        for i, dtype in enumerate(device.dtypes):
            if dtype not in spec.low_precision:
                continue
            for j, n in enumerate(device.lengths if spec.by_length else (None,)):
                rows = n and max(1, device.elements // n)
                row = Row(SECTION, spec.name, dtype=str(dtype)[6:], n=n, rows=rows)
                op = Op(device, spec, dtype, row, ceilings)
                rank = i if j < MAIN else i + 2
                case = Case(row, partial(op.against, others), first=partial(op.called, others))
                found.append(((rank, n is None, j), case))
                rank = i + 2 if j == 0 else i + 4
                found.append(((rank, n is None, j), Case(row, op.compiled, "compiled")))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Op:
    """An op in a dtype, at a length of rows."""

    device: Card
    spec: OpSpec
    dtype: torch.dtype
    row: Row
    ceilings: Callable[[], Ceilings]

    def against(self, peers: dict[str, Call]) -> Iterator[Row]:
        """Ours, stock and the peers."""
        with self.device.for_peers():
            who = {"ours": self.spec.function, "stock": self.spec.reference}
            yield from self.measured(who, peers)

    def compiled(self) -> Iterator[Row]:
        """Stock's function, compiled."""
        return self.measured({"compiled": self.device.compiled(self.spec.reference)}, {})

    def called(self, peers: dict[str, Call]) -> None:
        """Ours and the peers, once, which compiles what they launch. What fails is reported when it
        is timed."""
        with self.device.for_peers():
            for function in (self.spec.function, *peers.values()):
                (given,) = self._inputs(1)
                with suppress(Exception):
                    given.forward(function)
                    given.both(function)

    def measured(self, who: dict[str, Call], peers: dict[str, Call]) -> Iterator[Row]:
        """All in turns."""
        ceilings, calls = self.ceilings(), dict(who)
        inputs = {name: self._inputs() for name in (*who, *peers)}
        first = next(iter(inputs.values()))[0]
        least = {d: replace(self.row, direction=d, **c) for d, c in costs(self.spec, first)}
        if (seconds := ceilings.least(least[BOTH])) > self.device.longest:
            reason = f"a call takes {seconds:.1f} s or more"
            yield from (replace(self.row, who=w).because("skipped", reason) for w in who)
            return
        for name, function in peers.items():
            if reason := differs(self.spec, function, inputs[name][0]):
                yield replace(self.row, who=name).because("skipped", reason)
            else:
                calls[name] = function
        for direction in DIRECTIONS:
            if direction == BACKWARD and first.is_loss:
                continue
            timers: dict[str, Timer] = {}
            for name, function in calls.items():
                row = replace(least[direction], who=name)
                try:
                    timers[name] = self.device.timer(
                        partial(timed, function, inputs[name], direction)
                    )
                except Exception as error:
                    yield row.because(*verdict(name, error))
                    if self.device.is_lost():
                        raise
            for name, seconds in self.device.seconds(timers).items():
                yield ceilings.timed(replace(least[direction], who=name), seconds)

    def _inputs(self, most: int = 8) -> list[Inputs]:
        return inputs_of(
            self.spec, self.device, self.dtype, self.row.rows, self.row.n, self.device.size, most
        )


def verdict(who: str, error: Exception) -> tuple[str, str]:
    """Status and reason. Only ours can fail; and memory may be short."""
    short = isinstance(error, torch.cuda.OutOfMemoryError)
    reason = "out of memory" if short else f"{type(error).__name__}: {error}"
    return "failed" if who == "ours" and not short else "skipped", reason


def costs(spec: OpSpec, given: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fewest bytes, and the flops of products, by direction. The bytes are those of the tensors
    that ours takes, keeps and returns, as ``kernels --traffic`` counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        results = given.results(spec.function)
        forward = counter.get_total_flops()
        saved = saved_by(results)
        grads = given.gradients(results)
        both = counter.get_total_flops()
    tensors = [a for a in given.sample.args if isinstance(a, Tensor)]
    floors = floors_of(spec, tensors, results, saved, given.dys, grads)
    moved = {
        FORWARD: floors["inference"],
        BACKWARD: floors["backward"],
        BOTH: floors["forward"] + floors["backward"],
    }
    flops = {FORWARD: forward, BACKWARD: both - forward, BOTH: both}
    for d in DIRECTIONS:
        yield d, {"bytes": None if spec.gathers else moved[d], "flops": flops[d] or None}


def differs(spec: OpSpec, function: Call, given: Inputs) -> str:
    """Why a peer's function is not the op; empty if it is. It may overwrite what it is given."""
    stock = given.both(spec.reference)
    try:
        theirs = given.both(function)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if [y.shape for y in theirs] != [y.shape for y in stock]:
        return "its results have other shapes than stock's"
    for y, z in zip(theirs, stock, strict=True):
        off = (y.double() - z.double()).abs().max().item()
        if not off <= TOLERANCE * z.double().abs().max().item():
            return f"its results differ from stock's by {off:.1e}"
    return ""
