"""What the commands share: which ops are meant, processes to work on them, a table, and errors of
the caller."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
        help="an op, that one alone; or a family that is no op (activation, loss, contrastive), all its ops; default: all",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: one a core",
    )
    parser.add_argument("--json", metavar="F", help="also write the results to this file")


def refuse(message: str) -> NoReturn:
    """The caller asked for what cannot be had: exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_json(path: str | None) -> None:
    """Refuses, before the work begins, a file that could not be written after it."""
    if path is not None and (not Path(path).parent.is_dir() or Path(path).is_dir()):
        refuse(f"--json {path}: no file can be written there")


def check_device(device: str) -> None:
    """Refuses a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (
        AssertionError,
        RuntimeError,
    ) as error:  # AssertionError: cuda, of a torch built without it
        refuse(f"no device {device!r}: {str(error).splitlines()[0]}")


def select(wanted: Sequence[str]) -> list[str]:
    """The names of the ops that are named, or whose family is; all if nothing is."""
    try:
        return [spec.name for spec in named(wanted)]
    except ValueError as error:
        refuse(str(error))


@contextmanager
def interpreter(on: bool) -> Iterator[None]:
    """Triton's interpreter for the processes that start inside: it is chosen before kernels are
    decorated, so never in this one."""
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
    function: Callable[..., Any], items: Sequence[tuple[Any, ...]], jobs: int
) -> dict[tuple[Any, ...], Any]:
    """item -> ``function(*item)``, or the exception that it raised, computed in fresh processes
    under a progress bar."""
    results: dict[tuple[Any, ...], Any] = {}
    with ProcessPoolExecutor(
        max(1, min(jobs, len(items))), mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        futures: dict[Future[Any], tuple[Any, ...]] = {
            pool.submit(function, *item): item for item in items
        }
        try:
            with progress(len(items), "op") as bar:
                for future in as_completed(futures):
                    item = futures[future]
                    results[item] = future.exception() or future.result()
                    bar.set_postfix_str(item[0])
                    bar.update()
        except KeyboardInterrupt:  # the pool would wait for the work that it has handed out
            for worker in list(pool._processes.values()):
                worker.kill()
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)
    return {item: results[item] for item in items}


def _one_thread() -> None:
    torch.set_num_threads(1)


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in zip(row, widths, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
