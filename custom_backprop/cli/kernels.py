"""Compiles every kernel for several GPUs, without a GPU, and prints the resources that it takes.
With --audit it runs every kernel in the interpreter and prints which memory it accesses; with
--traffic, how many bytes each op moves, over the fewest possible.

The kernels are those of the ops and of the optimizers (--traffic: of the ops). The exit code is 1
if a kernel spills, has atomics or takes more shared memory than a block has, or if it is short of
its goals on sm_90 (``testing/goals.py``); in the audit, if it accesses memory that it must not; in
the traffic, if a memory-bound op moves too much; and if an op launches no kernel at all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..testing import TARGETS, Audit, AuditedLaunch, Resources, Traffic, database, traffic
from ..testing.audit import audit_op
from ..testing.optimizers import OPTIMIZERS, audit_optimizer, steps
from ..testing.regimes import compile_calls, compile_op
from . import INTERRUPTED
from .work import (
    add_common,
    check_file,
    in_processes,
    interpreter,
    refuse,
    select,
    table,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    add_common(parser)
    parser.add_argument(
        "--target",
        default=",".join(TARGETS),
        help="some of %(default)s (the default), with commas between",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="print each variant of a kernel (size, alignment, compile-time arguments) by itself",
    )
    interpreted = parser.add_mutually_exclusive_group()
    interpreted.add_argument(
        "--audit",
        action="store_true",
        help="run the kernels in Triton's interpreter and watch every load and store",
    )
    interpreted.add_argument(
        "--traffic",
        action="store_true",
        help="run the kernels in Triton's interpreter and count the bytes that they move",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a kernel has a fault or an op has none, 130 after an interruption."""
    check_file(args.json)
    if find_spec("triton") is None:
        refuse("the package triton is not installed")
    known = () if args.traffic else OPTIMIZERS
    optimizers = [n for n in known if not args.ops or n in args.ops or "optim" in args.ops]
    ops = [n for n in args.ops if n not in optimizers and not (optimizers and n == "optim")]
    names = [*(select(ops) if ops or not args.ops or not optimizers else []), *optimizers]
    targets = args.target.split(",")
    if unknown := [t for t in targets if t not in TARGETS]:
        refuse(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    start = time.perf_counter()
    with interpreter(args.audit or args.traffic):
        work = _audit if args.audit else _traffic if args.traffic else _compile
        on = [(t,) for t in targets] if work is _compile else [()]
        items = [(n, *target) for n in names for target in on]
        results = in_processes(work, items, args.jobs)
    done = {
        item: result for item, result in results.items() if not isinstance(result, BaseException)
    }
    if args.audit:
        print(_audited({name: seen for (name,), seen in done.items()}))
    elif args.traffic:
        print(_moved([moved for both in done.values() for moved in both]))
    else:
        for target in targets:
            of = {n: found for (n, t), found in done.items() if t == target}
            print(f"\n{target}\n{_compiled(of, args.variants)}")
    found = [
        {"op": item[0], **one.to_dict()}
        for item, result in done.items()
        for one in (result.launches if args.audit else result)
    ]
    faults = [
        f"{' on '.join(item)}: {type(e).__name__}: {e}"
        for item, e in results.items()
        if isinstance(e, BaseException)
    ]
    faults += [
        f"{' on '.join(item)}: no kernel was launched"
        for item, result in done.items()
        if not (result.launches if args.audit else result)
    ]
    faults += [f"{f['op']}: {_label(f)}: {fault}" for f in found for fault in f["faults"]]
    if args.audit:
        faults += [difference for seen in done.values() for difference in seen.differences]
    faults = list(dict.fromkeys(faults))
    for fault in faults:
        print(f"FAULT {fault}")
    kind = "launches" if args.audit else "directions" if args.traffic else "kernels"
    what = f"{len(found)} {kind} of {len(names) - len(optimizers)} ops"
    if optimizers:
        what += f" and {len(optimizers)} optimizers"
    print(f"\n{what}, {len(faults)} faults, in {time.perf_counter() - start:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {args.json}")
    if len(results) < len(items):
        print(f"interrupted after {len(results)} of {len(items)}")
        return INTERRUPTED
    return 1 if faults else 0


def _compile(name: str, target: str) -> list[Resources]:
    return (
        compile_calls(steps(name), target)
        if name in OPTIMIZERS
        else compile_op(database()[name], target)
    )


def _audit(name: str) -> Audit:
    return audit_optimizer(name) if name in OPTIMIZERS else audit_op(database()[name])


def _traffic(name: str) -> list[Traffic]:
    return traffic(database()[name])


def _label(found: dict[str, Any]) -> str:
    if "target" in found:
        return (
            f"{found['kernel']} ({found['signature']}; {found['constants']}) on {found['target']}"
        )
    return found.get("kernel") or found["direction"]


def _compiled(compiled: dict[str, list[Resources]], variants: bool) -> str:
    """One row for each op, kernel and dtype: the maximum of each figure over its variants (sizes,
    alignments, compile-time arguments). Or a row for each of these."""
    groups: dict[tuple[str, ...], list[Resources]] = {}
    for op, resources in compiled.items():
        for i, r in enumerate(resources):
            key: tuple[str, ...] = op, r.kernel, r.signature.split(",")[0].strip("*")
            groups.setdefault((*key, str(i)) if variants else key, []).append(r)
    rows = [
        [
            "op",
            "kernel",
            "dtype",
            "variants",
            "warps",
            "registers",
            "spilled",
            "shared",
            "128-bit loads",
            "128-bit stores",
            "atomics",
            "instructions",
            "an element",
            "a number",
            "resident",
            "KB in flight",
        ]
    ]
    for key, group in groups.items():
        most = [
            str(max(getattr(r, field) for r in group))
            for field in ("num_warps", "registers", "spilled", "shared")
        ]
        last = [str(max(getattr(r, field) for r in group)) for field in ("atomics", "instructions")]
        element = max(r.per_element for r in group)
        last.append(f"{element:.1f}" if element else "-")
        last += _of_passes(group)
        rows.append([*key[:3], str(len(group)), *most, *_wide(group), *last])
        if variants:
            rows[-1].append(group[0].constants)
    if variants:
        rows[0].append("compile-time arguments")
    return table(rows)


def _of_passes(group: Iterable[Resources]) -> tuple[str, str, str]:
    """Of the variants that were looked at pass by pass: the most instructions a number moved, the
    fewest programs of a multiprocessor, and the fewest KB in flight on it."""
    seen = [r for r in group if r.passes]
    if not seen:
        return "-", "-", "-"
    numbers = max((r.per_number for r in seen), key=max)
    flights = [r.in_flight for r in seen if r.in_flight]
    return (
        ", ".join(f"{n:.1f}" for n in numbers),
        str(min(r.resident for r in seen)),
        ", ".join(f"{n / 1024:.0f}" for n in min(flights, key=min, default=[])) or "-",
    )


def _wide(group: Iterable[Resources]) -> tuple[str, str]:
    """The variant with the smallest share of 128-bit accesses, for loads and for stores."""
    loads = min(((r.wide_loads, r.loads) for r in group), key=_share)
    stores = min(((r.wide_stores, r.stores) for r in group), key=_share)
    return "{} of {}".format(*loads), "{} of {}".format(*stores)


def _share(pair: tuple[int, int]) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0


def _audited(audits: dict[str, Audit]) -> str:
    """One row for each op and kernel."""
    groups: dict[tuple[str, str], list[AuditedLaunch]] = {}
    for op, seen in audits.items():
        for launch in seen.launches:
            groups.setdefault((op, launch.kernel), []).append(launch)
    rows = [["op", "kernel", "launches", "most programs", "moved / floor", "faults", "read again"]]
    for key, group in groups.items():
        ratio = sum(i.moved for i in group) / max(1, sum(i.floor for i in group))
        again = {
            name: max(i.reread.get(name, 1.0) for i in group) for i in group for name in i.reread
        }
        rows.append(
            [
                *key,
                str(len(group)),
                str(max(i.programs for i in group)),
                f"{ratio:.3f}",
                str(sum(len(i.faults) for i in group)),
            ]
        )
        rows[-1].append(", ".join(f"{name} x{times:.1f}" for name, times in again.items()))
    return table(rows)


def _moved(found: Iterable[Traffic]) -> str:
    """One row for each op and direction."""
    rows = [["op", "direction", "moved", "floor", "moved / floor", "memory-bound"]]
    for f in found:
        bound = "yes" if f.is_memory_bound else "no"
        rows.append([f.op, f.direction, str(f.moved), str(f.floor), f"{f.ratio:.3f}", bound])
    return table(rows)
