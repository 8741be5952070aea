"""What the commands share: the selection of ops, processes that work on them, a table, and errors
for bad arguments."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..testing.database import named
from .progress import progress


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that works on ops."""
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="an op; or a family, for all its ops, unless an op has its name (activation, loss, "
        "contrastive); default: all",
    )
    add_jobs(parser)
    parser.add_argument("--json", metavar="F", help="also write the results to this file")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The option for how many processes work."""
    parser.add_argument(
        "--jobs",
        type=count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: one per core",
    )


def count(text: str) -> int:
    """The type of an option that is at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def refuse(message: str) -> NoReturn:
    """Ends the program for a bad argument, with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_file(path: str | None, option: str = "--json") -> None:
    """Raises before the work begins if the file could not be written after it."""
    if path is not None and (not Path(path).parent.is_dir() or Path(path).is_dir()):
        refuse(f"{option} {path}: no file can be written there")


def check_device(device: str) -> None:
    """Raises for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (
        AssertionError,
        RuntimeError,
    ) as error:  # AssertionError: cuda, if torch was built without it
        refuse(f"no device {device!r}: {str(error).splitlines()[0]}")


def select(wanted: Sequence[str]) -> list[str]:
    """The names of the selected ops: those named, and those whose family is named; all if none
    is."""
    try:
        return [spec.name for spec in named(wanted)]
    except ValueError as error:
        refuse(str(error))


@contextmanager
def interpreter(on: bool) -> Iterator[None]:
    """Sets Triton's interpreter for the processes that start inside. Not for this one: it must be
    set before kernels are decorated."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def in_processes(
    function: Callable[..., Any], items: Sequence[tuple[Any, ...]], jobs: int, unit: str = "op"
) -> dict[tuple[Any, ...], Any]:
    """item -> ``function(*item)``, or the exception that it raised. It runs in fresh processes,
    with a progress bar. After an interruption the result has only the items that were done."""
    results: dict[tuple[Any, ...], Any] = {}
    waiting = deque(items)
    with progress(len(items), unit) as bar:

        def done(item: tuple[Any, ...], result: Any) -> None:
            results[item] = result
            bar.set_postfix_str(" ".join(item[:-1]) or item[0])
            bar.update()

        while waiting:
            lost, interrupted = _in_one_pool(function, waiting, jobs, done)
            for item in lost:  # the process of one of them died and broke the pool
                if not interrupted:
                    again, interrupted = _in_one_pool(function, deque([item]), 1, done)
                    if again and not interrupted:
                        done(item, RuntimeError("the process that worked on it died"))
            if interrupted:
                print("interrupted", file=sys.stderr, flush=True)
                break
    return {item: results[item] for item in items if item in results}


def _in_one_pool(
    function: Callable[..., Any],
    waiting: deque[tuple[Any, ...]],
    jobs: int,
    done: Callable[[tuple[Any, ...], Any], None],
) -> tuple[list[tuple[Any, ...]], bool]:
    """Takes items from ``waiting`` until it is empty, a process dies or the user interrupts.
    Returns the items in work when a process died, and whether the user interrupted."""
    workers = min(jobs, len(waiting))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare_worker)
    running: dict[Future[Any], tuple[Any, ...]] = {}
    lost: list[tuple[Any, ...]] = []
    try:
        while running or (waiting and not lost):
            while waiting and not lost and len(running) < workers:
                item = waiting.popleft()
                try:
                    running[pool.submit(function, *item)] = item
                except BrokenProcessPool:
                    lost.append(item)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    lost.append(item)
                else:
                    done(item, error or future.result())
        pool.shutdown()
    except KeyboardInterrupt:  # shutdown would wait for running work
        for worker in list(pool._processes.values()):
            worker.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        return [], True
    return lost, False


def prepare_worker() -> None:
    """What each worker process does first."""
    torch.set_num_threads(1)
    # each would start as many compilers of Inductor as there are cores
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers


def table(rows: Iterable[Sequence[Any]]) -> str:
    """A table with columns as wide as their widest cell, and numbers aligned to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in zip(row, widths, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
