"""The host's time: of small calls, one after another, until the GPU has finished them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from custom_backprop.testing import OpSpec

from .case import BOTH, FORWARD, Case, inputs_of, timed
from .device import Card
from .results import Row

SECTION = "host"


def cases(device: Card, specs: Sequence[OpSpec]) -> list[Case]:
    """Each op."""
    found = []
    for spec in specs:
        row = Row(SECTION, spec.name, dtype="float32")
        found.append(Case(row, partial(_measured, device, spec, row)))
    return found


def _measured(device: Card, spec: OpSpec, row: Row) -> Iterator[Row]:
    inputs = inputs_of(spec, device, torch.float32, None, None, "small", 1)
    for direction in (FORWARD, BOTH):
        timers = {
            who: device.host_timer(partial(timed, function, inputs, direction))
            for who, function in (("ours", spec.function), ("stock", spec.reference))
        }
        for who, seconds in device.seconds(timers).items():
            yield replace(row, direction=direction, who=who, seconds=seconds)
