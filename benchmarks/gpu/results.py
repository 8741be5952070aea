"""The file of results: one JSON for a card, which the next run goes on with.

::

    {"schema": 1,
     "command": "python -m benchmarks.gpu --minutes 9",
     "machine": {"card": "NVIDIA H200", "memory": 150754820096, "multiprocessors": 132,
                 "driver": "570.86.15", "cuda": "12.8", "torch": "2.11.0", "triton": "3.6.0",
                 "python": "3.12.3", "custom_backprop": "0.2.0", "code": "5e1f0c1a2b3d",
                 "date": "2026-11-29", "peers": {"liger-kernel": "0.8.5"}},
     "rows": [{"case": "sweep/softmax/bfloat16/4096", "section": "sweep", "op": "softmax",
               "direction": "forward", "dtype": "bfloat16", "n": 4096, "rows": 16384,
               "who": "ours", "status": "ok", "seconds": 6.5e-05, "bytes": 268435456,
               "tbps": 4.13, "fraction": 0.97}, ...],
     "left": ["sweep/softmax/float32/512", ...]}

``code`` is a digest of the package's sources. ``peers`` has those that are installed. ``left`` has
the cases that the last run did not reach. A row is a :class:`Row`, without the fields that are
None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        case: what was measured together, and is measured again together.
        section: "ceilings", "sweep", "host", "steps", "graphs" or "database".
        op: its name in the database; of ceilings "copy" or "matmul"; of steps the model's name.
        who: "ours", "stock", "compiled" (stock's, by torch.compile), or the package of a peer.
        direction: "forward", "backward", "forward+backward", or "step".
        n: numbers in a row, of ops that are measured by it; ``rows`` so many.
        status: "ok", "failed", or "skipped", both with a ``reason``.
        seconds: of one call: the GPU's own time; of host and steps by the clock.
        bytes: the fewest that must move; the same for everybody.
        flops: of matrix products; the same for everybody.
        tbps: TB/s, of these bytes.
        tflops: TFLOP/s, of these flops.
        fraction: the least time that the ceilings allow for bytes and flops, over the time.
        memory: bytes at the peak.
    """

    section: str
    op: str
    who: str = "ours"
    direction: str | None = None
    dtype: str | None = None
    n: int | None = None
    rows: int | None = None
    case: str = ""
    status: str = "ok"
    reason: str | None = None
    seconds: float | None = None
    bytes: int | None = None
    flops: int | None = None
    tbps: float | None = None
    tflops: float | None = None
    fraction: float | None = None
    memory: int | None = None

    def because(self, status: str, reason: object) -> Row:
        """The same row, skipped or failed."""
        return replace(self, status=status, reason=str(reason).strip().split("\n")[0][:300])


class Store:
    """The rows of a file. What an earlier run of the same machine, versions and sources wrote is
    there from the start. After each case the whole file is replaced at once, so that whatever ends
    the process leaves it as it was after the last case."""

    def __init__(self, file: Path, machine: dict[str, Any], command: str) -> None:
        self.file, self.machine, self.command = file, machine, command
        self.rows: list[Row] = []
        self.left: list[str] = []
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["schema"] == SCHEMA and _same(found["machine"], machine):
                self.rows = [Row(**row) for row in found["rows"]]
                self.machine = found["machine"]

    def done(self) -> set[str]:
        """The cases that need not run."""
        return {row.case for row in self.rows}

    def forget(self) -> None:
        """The cases that failed or were skipped are to run again."""
        gone = {row.case for row in self.rows if row.status != "ok"}
        self.rows = [row for row in self.rows if row.case not in gone]

    def add(self, case: str, rows: Iterable[Row]) -> None:
        """The rows of a case, instead of those that it had."""
        self.rows = [row for row in self.rows if row.case != case]
        self.rows += [replace(row, case=case) for row in rows]
        self.write()

    def write(self) -> None:
        """Replaces the file."""
        kept = {"schema": SCHEMA, "command": self.command, "machine": self.machine}
        lines = ",\n".join(json.dumps(without_none(row)) for row in self.rows)
        head = json.dumps({**kept, "left": self.left}, indent=1).rstrip("\n}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(new, self.file)


def without_none(row: Row) -> dict[str, Any]:
    """The fields of a row that say something."""
    return {name: value for name, value in asdict(row).items() if value is not None}


def read(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """All but the rows of a file; and its rows."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return found, [Row(**row) for row in found.pop("rows")]


@dataclass(frozen=True)
class Ratio:
    """How ours compares: the best of the others, and its time over ours."""

    ours: Row
    best: Row

    @property
    def ratio(self) -> float:
        assert self.ours.seconds
        assert self.best.seconds
        return self.best.seconds / self.ours.seconds


def ratios(rows: Iterable[Row], section: str = "sweep") -> list[Ratio]:
    """Of each figure of ours, against the fastest of stock, torch.compile and the peers."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.section == section and row.status == "ok" and row.seconds:
            key = row.op, row.direction, row.dtype, row.n
            found.setdefault(key, {})[row.who] = row
    return [
        Ratio(by["ours"], min(others, key=lambda row: row.seconds or 0.0))
        for by in found.values()
        if "ours" in by and (others := [row for who, row in by.items() if who != "ours"])
    ]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether figures of both may stand in one file."""
    return {**one, "date": ""} == {**other, "date": ""}
