"""What no clock looks at, many cases at once in processes of their own: the checks and the CUDA
graphs, and a first call of what is timed later, so that Triton finds on disk what it compiled.
Compiling takes longer than all else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from queue import Empty
from typing import Any

from custom_backprop.cli.work import prepare_worker
from custom_backprop.testing.database import named

from .case import Case
from .ceilings import Ceilings
from .device import Card
from .peers import peers
from .results import Store
from .run import rows_of
from .sections import sections


def run(
    plan: Mapping[str, Sequence[Case]],
    store: Store,
    device: Card,
    ops: Sequence[str],
    until: float,
    tell: Callable[[str], None],
) -> None:
    """Runs what is not in the store until it is done, or until ``until``, a reading of
    ``time.perf_counter``. A case that is not right, or whose process ends, is left for its turn
    alone."""
    waiting = in_turns(plan, store.done())
    count = min(device.workers, len(waiting))
    if count < 1:
        return
    context = get_context("spawn")  # a fork could not use the card
    keys, found = context.Queue(), context.Queue()
    for key in [*waiting, *[None] * count]:
        keys.put(key)
    keys.cancel_join_thread()
    workers = [
        context.Process(target=_work, args=(type(device), ops, keys, found), daemon=True)
        for _ in range(count)
    ]
    try:
        for worker in workers:
            worker.start()
        while time.perf_counter() < until:
            lives = any(worker.is_alive() for worker in workers)
            try:
                key, rows = found.get(timeout=1.0)
            except Empty:
                if lives:
                    continue
                break
            if rows and all(row.status == "ok" for row in rows):
                tell(key)
                store.add(key, rows)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def in_turns(plan: Mapping[str, Sequence[Case]], done: set[str]) -> list[str]:
    """The keys of what can run ahead, of all sections at the same pace."""
    found: list[tuple[float, str]] = []
    for cases in plan.values():
        mine = [c.key for c in cases if (c.first or not c.timed) and c.key not in done]
        found += [(i / len(mine), key) for i, key in enumerate(mine)]
    return [key for _, key in sorted(found, key=lambda pair: pair[0])]


def _work(kind: type[Card], ops: Sequence[str], keys: Any, found: Any) -> None:
    """Takes keys until it gets None, or until the card is lost to this process."""
    prepare_worker()
    device = kind()
    with device.ready():
        plan = sections(device, named(ops), peers(), lambda: Ceilings.of([]))
        cases = {case.key: case for part in plan.values() for case in part}
        while (key := keys.get()) is not None:
            case = cases[key]
            if case.first:
                case.first()
            found.put((key, [] if case.timed else rows_of(case)))
            if device.is_lost():
                break
            device.free()
