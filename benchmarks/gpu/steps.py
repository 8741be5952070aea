"""A training step, end to end: a GPT of 124 million parameters and a ViT-B, converted, stock, and
stock compiled, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from custom_backprop.backends import use_backend

from ..models import measured
from .case import Case
from .device import Card
from .results import Row

SECTION = "steps"
MODELS = ("gpt", "vit-b")
#: a side of ``benchmarks.models`` -> who
SIDES = {"stock": "stock", "converted": "ours", "stock compiled": "compiled"}


def cases(device: Card) -> list[Case]:
    """Both models."""
    dtype = "bfloat16" if device.kind == "cuda" else "float32"
    found = []
    for name in MODELS:
        row = Row(SECTION, name, direction="step", dtype=dtype)
        found.append(Case(row, partial(_trained, device, row)))
    return found


def _trained(device: Card, row: Row) -> Iterator[Row]:
    def tell(part: str) -> None:
        """Nobody is told."""

    options = device.model_seconds, list(SIDES), tell, device.backend
    with use_backend(None):  # on a CPU, too, what a user gets
        rows = measured(row.op, device.network, device.kind, *options)
    for found in rows:
        who = SIDES[found["side"]]
        if "error" in found:
            short = "out of memory" in found["error"]
            status = "failed" if who == "ours" and not short else "skipped"
            yield replace(row, who=who).because(status, found["error"])
        else:
            yield replace(row, who=who, seconds=found["ours"], memory=found["peak_bytes"])
