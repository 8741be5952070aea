"""Proves the backward of every op against PyTorch autograd: runs every check on every op of the
database, and prints one row per op."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch

from ..backends import BACKENDS, why_not
from ..testing import CHECKS, Report, Result, check_op, database
from . import INTERRUPTED
from .work import (
    add_common,
    check_device,
    check_file,
    in_processes,
    interpreter,
    refuse,
    select,
    table,
)

#: a check's status -> its mark in the table. Our own ops offer everything that a check asks of them
MARKS = {"right": "ok", "wrong": "X", "not offered": "X", "not run": "~", "n/a": "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    add_common(parser)
    parser.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="may be given several times; default: all that can run here",
    )
    parser.add_argument(
        "--check",
        action="append",
        choices=list(CHECKS),
        dest="checks",
        help="only this check; may be given several times",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if any check failed or nothing was checked, 130 after an interruption."""
    check_file(args.json)
    names = select(args.ops)
    checks = args.checks or list(CHECKS)
    check_device(args.device)
    if torch.device(args.device).type not in ("cpu", "cuda"):
        refuse(f"--device {args.device}: the checks need values, on a CPU or a GPU")
    with (
        interpreter(True) if args.device == "cpu" else nullcontext()
    ):  # without a GPU, the interpreter runs the kernels
        reasons = {b: why_not(b, args.device) for b in args.backend or BACKENDS}
        for backend, reason in reasons.items():
            if reason and args.backend:
                refuse(f"backend {backend!r} cannot run on {args.device}: {reason}")
            if reason:
                print(f"without backend {backend}: {reason}")
        backends = [b for b, reason in reasons.items() if reason is None]
        start = time.perf_counter()
        pairs = [(name, backend) for name in names for backend in backends]
        work = [(*pair, check, args.device) for pair in pairs for check in checks]
        results = in_processes(_check, work, args.jobs, "check")
        seconds = time.perf_counter() - start
    reports = {}
    for pair in pairs:
        found = [results[item] for item in work if item[:2] == pair and item in results]
        if len(found) == len(checks):
            reports[pair] = _merged(pair[0], found)
    for backend in backends:
        if of_one := {name: r for (name, b), r in reports.items() if b == backend}:
            print(f"\nbackend {backend}\n{_rows(of_one, checks)}")
    failed = [key for key, report in reports.items() if not _right(report)]
    for name, backend in failed:
        for result in reports[name, backend].results:
            if result.status in ("wrong", "not offered"):
                print(f"\nFAIL {name} [{backend}] {result.check}\n  {result.detail}")
    print(
        f"\n{len(reports) - len(failed)} passed, {len(failed)} failed: "
        f"{len(names)} ops on {', '.join(backends)} in {seconds:.0f} s"
    )
    nothing = not any(r.status != "n/a" for report in reports.values() for r in report.results)
    if nothing:
        print("nothing was checked: no check applies")
    if len(reports) < len(pairs):
        print(f"interrupted after {len(reports)} of {len(pairs)}")
    if args.json:
        rows = [
            {"op": n, "backend": b, "formula": database()[n].formula, **r.to_dict()}
            for (n, b), r in reports.items()
        ]
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {args.json}")
    if len(reports) < len(pairs):
        return INTERRUPTED
    return 1 if failed or nothing else 0


def _check(name: str, backend: str, check: str, device: str) -> Report:
    return check_op(database()[name], backend, device, [check])


def _right(report: Report) -> bool:
    return not report.failures and not report.not_offered


def _merged(name: str, results: Iterable[Report | BaseException]) -> Report:
    """The report of one op on one backend. What a check raised is the result of a check "run"."""
    report = Report(name)
    for one in results:
        if not isinstance(one, Report):
            one = Report(name, [Result("run", "wrong", f"{type(one).__name__}: {one}")])
        report.merge(one)
    return report


def _rows(reports: dict[str, Report], checks: list[str]) -> str:
    """One row per op. The names of the checks are longer than their marks, so the header is a
    staircase."""
    width = max(map(len, reports))
    stairs = [" " * width + "  " + "│  " * i + check for i, check in enumerate(checks)]
    rows: list[list[str]] = []
    for name, report in reports.items():
        marks = {r.check: MARKS[r.status] for r in report.results}
        errors = [
            "{:.0e} / {:.0e}".format(*report.errors[d]) if d in report.errors else "-"
            for d in ("float32", "bfloat16")
        ]
        rows.append(
            [
                name.ljust(width),
                "".join(f"{marks.get(c, '?'):<3}" for c in checks),
                *errors,
            ]
        )
        not_run = [
            f"{r.check} not run: {r.detail}" for r in report.results if r.status == "not run"
        ]
        rows[-1].append("; ".join([*not_run, database()[name].formula]))
    heading = [
        [" " * width, "│  " * len(checks), "float32 error: ours / torch's", "bfloat16", "formula"]
    ]
    return "\n".join([*stairs, table([*heading, *rows])])
