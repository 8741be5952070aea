"""``check``: every op of the database against every check, one row an op."""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS, why_not
from ..testing import CHECKS, Report, check_op, database
from ..testing.validate import SYMBOL
from .progress import progress


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds this command to the command line."""
    parser = subparsers.add_parser("check", help="prove each op's backward against PyTorch autograd", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="names of ops or families; default: all")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be given several times; default: all that can run here")
    parser.add_argument("--check", action="append", choices=list(CHECKS), dest="checks", help="only this check; may be given several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the reports there")
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 1 if any check failed."""
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # lets the kernels run, and so be proved, without a GPU
    names = _select(args.ops)
    backends = args.backend or [b for b in BACKENDS if why_not(b, args.device) is None]
    for backend in backends:
        if (reason := why_not(backend, args.device)) is not None:
            raise SystemExit(f"backend {backend!r} cannot run on {args.device}: {reason}")
    work = [(name, backend) for name in names for backend in backends]
    reports: dict[tuple[str, str], Report] = {}
    start = time.perf_counter()
    jobs = max(1, min(args.jobs, len(work)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures: dict[Future[Report], tuple[str, str]] = {pool.submit(_check, n, b, args.device, args.checks): (n, b) for n, b in work}
        with progress(len(work), "op") as bar:
            for future in as_completed(futures):
                reports[futures[future]] = future.result()
                bar.set_postfix_str(futures[future][0])
                bar.update()
    _print(names, backends, reports, args.checks or list(CHECKS))
    failed = [key for key, report in reports.items() if not report.passed]
    seconds = time.perf_counter() - start
    print(f"\n{len(work) - len(failed)} passed, {len(failed)} failed: {len(names)} ops on {', '.join(backends)} in {seconds:.0f} s")
    if args.json:
        found = [{"op": n, "backend": b, "formula": database()[n].formula, **reports[n, b].to_dict()} for n, b in work]
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 1 if failed else 0


def _select(wanted: list[str]) -> list[str]:
    specs = database()
    unknown = [w for w in wanted if w not in specs and w not in {s.family for s in specs.values()}]
    if unknown:
        raise SystemExit(f"no op or family {', '.join(unknown)}; there are: {', '.join(specs)}")
    return [name for name, spec in specs.items() if not wanted or name in wanted or spec.family in wanted]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _check(name: str, backend: str, device: str, checks: list[str] | None) -> Report:
    return check_op(database()[name], backend, device, checks)


def _print(names: list[str], backends: list[str], reports: dict[tuple[str, str], Report], checks: list[str]) -> None:
    width = max(map(len, names), default=2)
    for backend in backends:
        print(f"\nbackend {backend}  (errors: ours / torch's own, against float64)")
        print("  ".join(["op".ljust(width), *checks, "float32".ljust(17), "bfloat16".ljust(17), "formula"]))
        for name in names:
            report = reports[name, backend]
            cells = {r.check: SYMBOL[r.status] for r in report.results}
            errors = ["{:.1e} / {:.1e}".format(*report.errors[d]) if d in report.errors else "-" for d in ("float32", "bfloat16")]
            marks = [cells.get(c, "-").ljust(len(c)) for c in checks]
            print("  ".join([name.ljust(width), *marks, *(e.ljust(17) for e in errors), database()[name].formula]))
    for (_, backend), report in reports.items():
        for result in report.results:
            if result.status == "fail":
                print(f"\nFAIL {report.name} [{backend}] {result.check}\n  {result.detail}")
