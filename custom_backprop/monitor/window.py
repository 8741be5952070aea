"""The sums of the steps measured since the last reading, on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sums import (
    DEAD_UNITS,
    NONFINITE,
    NONZERO,
    SEEN_UNITS,
    SILENT_UNITS,
    SQUARES,
    SUM,
    UNITS,
    UPDATE,
    WEIGHT,
    WIDTH,
)


class Window:
    """The sums of a window, with one row for each module of ``names``.

    Attributes:
        table: the sums; None until something is added.
        alive: by row, the largest gradient of each output unit, and its weight.
        mesh: that over which the model is sharded, or None.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.table: Tensor | None = None
        self.alive: dict[int, tuple[Tensor, float]] = {}
        self.mesh: Any = None
        self._indices: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def add_units(self, row: int, largest: Tensor, share: float) -> None:
        """Adds one step's largest gradient of each output unit."""
        if before := self.alive.get(row):
            largest = torch.maximum(before[0], largest)
        self.alive[row] = largest, share

    def add(
        self,
        first: int,
        rows: list[int],
        shares: list[float],
        sums: list[Tensor],
        scale: Tensor | None = None,
    ) -> None:
        """Adds one step's sums, five per entry, in the seven columns from ``first`` on. A layer
        with any non-finite element counts as a bad step, without a norm or a mean."""
        if len(devices := {t.device for t in sums}) > 1:
            raise RuntimeError(
                f"the model is on several devices ({', '.join(sorted(map(str, devices)))}): "
                "give each part its own monitor"
            )
        added = torch.stack(sums).view(len(rows), 5)
        added[:, SQUARES].square_()
        if scale is not None:
            added[:, SUM] *= scale
            added[:, SQUARES] *= scale.square()
        index, share, count = self._on_device(rows, shares, added)
        nonfinite = added.new_zeros(len(self._names)).index_add_(0, index, added[:, NONFINITE])
        bad = nonfinite.gt(0)[index]
        added[:, :NONZERO].masked_fill_(bad[:, None], 0)
        steps = torch.stack([count * ~bad, count * bad], dim=1)
        columns = self._sums(added)[:, first : first + 7]
        columns.index_add_(0, index, torch.cat([added * share[:, None], steps], dim=1))

    def add_updates(self, rows: list[int], shares: list[float], squares: Tensor) -> None:
        """Adds ‖Δw‖² and ‖w‖² of parameters."""
        index, share, _ = self._on_device(rows, shares, squares)
        columns = self._sums(squares)[:, UPDATE : WEIGHT + 1]
        columns.index_add_(0, index, squares * share[:, None])

    def end(self, silent: Iterable[tuple[int, Tensor]]) -> list[list[float]] | None:
        """The rows, in the one transfer of a window (for shards, after the one all-reduce). None if
        nothing was added. ``silent`` says which units of a row are silent."""
        table, self.table = self.table, None
        alive, self.alive = self.alive, {}
        if table is None:
            return None
        for row, (largest, share) in alive.items():
            table[row, DEAD_UNITS] = (largest == 0).sum() * share
            table[row, UNITS] = largest.numel() * share
        for row, units in silent:
            table[row, SILENT_UNITS] = units.sum()
            table[row, SEEN_UNITS] = units.numel()
        if self.mesh is not None:
            for dim in range(self.mesh.ndim):
                torch.distributed.all_reduce(table, group=self.mesh.get_group(dim))
        return table.tolist()

    def ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    def _on_device(
        self, rows: list[int], shares: list[float], like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, shares, and 1 / (entries of the row · ranks) on the device. They are sent there
        only once, because that makes the host wait."""
        key = (like.device, tuple(rows), tuple(shares))
        if key not in self._indices:
            entries = Counter(rows)
            count = [1 / entries[r] / self.ranks() for r in rows]
            index = torch.tensor(rows, device=like.device)
            self._indices[key] = index, like.new_tensor(shares), like.new_tensor(count)
        return self._indices[key]

    def _sums(self, like: Tensor) -> Tensor:
        if self.table is None:
            self.table = like.new_zeros(len(self._names), WIDTH)
        return self.table
