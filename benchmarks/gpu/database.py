"""The checks of ``custom_backprop check`` on the card's own kernels, gradcheck in float64 among
them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from custom_backprop.testing import OpSpec, check_op
from custom_backprop.testing.outcome import SEARCHED
from custom_backprop.testing.run import applicable

from .case import Case
from .device import Card
from .results import Row

SECTION = "database"


def cases(device: Card, specs: Sequence[OpSpec]) -> list[Case]:
    """Each op."""
    found = []
    for spec in specs:
        row = Row(SECTION, spec.name)
        found.append(Case(row, partial(_checked, device, spec, row), timed=False))
    return found


def _checked(device: Card, spec: OpSpec, row: Row) -> Iterator[Row]:
    """Without the checks that search, which take as long as they are given."""
    checks = device.checks or [check for check in applicable(None) if check not in SEARCHED]
    start = time.perf_counter()
    report = check_op(spec, "triton", device.kind, checks)
    row = replace(row, seconds=time.perf_counter() - start)
    faults = [
        f"{r.check}: {r.detail}" for r in report.results if r.status in ("wrong", "not offered")
    ]
    yield row.because("failed", "; ".join(faults)) if faults else row
