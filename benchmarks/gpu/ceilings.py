"""What the card can do at best: copy a large tensor, and multiply large matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from .case import Case
from .device import Card, Timed
from .results import Row

SECTION = "ceilings"


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy; floating-point operations a second of a product, by dtype."""

    copy: float
    products: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Ceilings:
        """Those that were measured.

        Raises:
            RuntimeError: none was.
        """
        found = [row for row in rows if row.section == SECTION and row.status == "ok"]
        copies = [row.bytes / row.seconds for row in found if row.bytes and row.seconds]
        if not copies:
            raise RuntimeError("the ceilings could not be measured")
        products = {
            str(row.dtype): row.flops / row.seconds for row in found if row.flops and row.seconds
        }
        return cls(copies[0], products)

    def least(self, row: Row) -> float:
        """The fewest seconds in which the bytes and the flops of a row are possible."""
        product = self.products.get(str(row.dtype))
        return max((row.bytes or 0) / self.copy, (row.flops or 0) / product if product else 0.0)

    def timed(self, row: Row, seconds: float) -> Row:
        """The row with its time, and what follows."""
        return replace(rates(row, seconds), fraction=self.least(row) / seconds or None)


def rates(row: Row, seconds: float) -> Row:
    """The row with its time and rates."""
    return replace(
        row,
        seconds=seconds,
        tbps=row.bytes / seconds / 1e12 if row.bytes else None,
        tflops=row.flops / seconds / 1e12 if row.flops else None,
    )


def cases(device: Card) -> list[Case]:
    """A copy, and a product in each dtype."""
    found = []
    for dtype in device.dtypes:
        name = str(dtype).removeprefix("torch.")
        row = Row(SECTION, "matmul", "stock", dtype=name, flops=2 * device.product**3)
        found.append(Case(row, partial(_measured, device, row, dtype)))
    elements = 4 * device.elements
    row = Row(SECTION, "copy", "stock", dtype="bfloat16", bytes=4 * elements)
    return [Case(row, partial(_measured, device, row, torch.bfloat16)), *found]


def _measured(device: Card, row: Row, dtype: torch.dtype) -> Iterator[Row]:
    def made() -> Timed:
        if row.op == "copy":
            x = torch.randn(4 * device.elements, device=device.kind, dtype=dtype)
            y = torch.empty_like(x)
            return (lambda: y.copy_(x)), tuple
        a, b = (
            torch.randn(device.product, device.product, device=device.kind, dtype=dtype)
            for _ in range(2)
        )
        return (lambda: a @ b), tuple

    yield rates(row, device.seconds({"": device.timer(made)})[""])
