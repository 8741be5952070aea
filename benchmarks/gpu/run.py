"""Runs cases until the time is spent: those of each section in their order, and of the sections the
one that has had least of its share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from .case import Case
from .device import Card
from .results import Row, Store
from .sweep import verdict


class CardLost(Exception):
    """Nothing runs on the card any more in this process."""


def run(
    plan: Mapping[str, Sequence[Case]],
    shares: Mapping[str, float],
    store: Store,
    device: Card,
    until: float,
    tell: Callable[[str], None] = lambda key: None,
) -> None:
    """Runs what is not in the store. ``until`` is a reading of ``time.perf_counter``: no case
    begins that would end later, if it took as long as the longest of its section. ``tell`` is
    called with the key of each case before it begins.

    Raises:
        CardLost: after a case that is stored as failed.
    """
    done = store.done()
    waiting = {
        name: deque(case for case in cases if case.key not in done) for name, cases in plan.items()
    }
    spent, longest = dict.fromkeys(plan, 0.0), dict.fromkeys(plan, 0.0)
    try:
        while True:
            begun = time.perf_counter()
            names = [n for n in plan if waiting[n] and begun + longest[n] < until]
            if not names:
                break
            name = min(names, key=lambda n: spent[n] / shares.get(n, 1.0))
            case = waiting[name][0]
            tell(case.key)
            rows = rows_of(case)
            waiting[name].popleft()
            store.left = _left(waiting)
            store.add(case.key, rows)
            if device.is_lost():
                raise CardLost(case.key)
            device.free()
            seconds = time.perf_counter() - begun
            spent[name] += seconds
            longest[name] = max(longest[name], seconds)
    finally:
        store.left = _left(waiting)
        store.write()


def _left(waiting: Mapping[str, Iterable[Case]]) -> list[str]:
    return [case.key for cases in waiting.values() for case in cases]


def rows_of(case: Case) -> list[Row]:
    """The rows of a case; of one that raises, those that it had, and why."""
    rows: list[Row] = []
    try:
        rows.extend(case.work())
    except Exception as error:
        rows.append(case.row.because(*verdict("ours", error)))
    return rows
