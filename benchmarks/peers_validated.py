"""Validates what published packages of Triton kernels export, in the interpreter, without a GPU,
and writes docs/peers.md.

    pip install -e '.[peers]'
    python -m benchmarks.peers_validated             # the ops that have no result yet
    python -m benchmarks.peers_validated softmax     # some of them, again
    python -m benchmarks.peers_validated --script liger-kernel:softmax

Results are kept in benchmarks/results/peers.json, op by op: a run that is interrupted goes on where
it was. An op that is found wrong is tried again by hand (benchmarks/peers/by_hand.py), in plain
torch; what does not show there is not reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from custom_backprop.testing import interpreted, validate

from .peers import OPS, Op
from .peers.by_hand import BY_HAND
from .peers.page import page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "peers.md"
SECONDS = 900  # for one op

#: left out: what the interpreter cannot judge (compilation by torch, autocast, half precision), and
#: gradcheck, which `gradient` already covers in float32
CHECKS = [
    "forward", "gradient", "gradgradcheck", "layouts", "input_layouts", "inputs_unchanged",
    "two_backwards", "freed", "subsets", "memory", "compiles", "forward_mode", "batched", "vmap",
]  # fmt: skip


def validated(op: Op) -> dict[str, Any]:
    """The result of one op, ready for JSON."""
    result: dict[str, Any] = {
        "package": op.package,
        "op": op.name,
        "version": version(op.package),
        "triton": version("triton"),
        "torch": torch.__version__,
    }
    if op.unavailable:
        return result | {"verdict": "not run", "reason": op.unavailable, "findings": []}
    loaded = op.load()
    given = [loaded[name] for name in ("function", "reference", "inputs")]
    function, reference, inputs = given
    with interpreted(pretend_cuda=op.pretend_cuda):
        report = validate(
            function,
            inputs,
            reference,
            dtype=torch.float32,
            low_precision=(torch.float32,),
            checks=CHECKS,
            name=op.name,
        )
        if report.verdict == "not run":
            return result | {
                "verdict": "not run", "reason": report.results[0].detail, "findings": [],
            }  # fmt: skip
        for x in inputs:
            if op.leaves is None and x.is_floating_point():
                x.requires_grad_()
        findings = [
            {
                "check": wrong.check,
                "detail": wrong.detail.removeprefix(f"{op.name}: "),
                "by_hand": BY_HAND[wrong.check](*given) if wrong.check in BY_HAND else "",
            }
            for wrong in report.failures
        ]
    return result | {
        "verdict": "wrong" if any(f["by_hand"] for f in findings) else "right",
        "findings": findings,
        "notes": report.notes,
        "checks": {r.check: r.status for r in report.results},
        "details": {r.check: r.detail for r in report.results if r.check in ("memory", "compiles")},
    }


def _send(op: Op, end: Connection) -> None:
    try:
        found = validated(op)
    except BaseException as error:
        found = {
            "package": op.package,
            "op": op.name,
            "version": version(op.package),
            "verdict": "not run",
            "reason": f"{type(error).__name__}: {error}",
            "findings": [],
        }
    end.send(found)


def in_a_process(op: Op) -> dict[str, Any]:
    """The result of one op, from a process that may hang or die."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(op, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(SECONDS):
            raise EOFError
        return mine.recv()  # type: ignore[no-any-return]
    except EOFError:
        reason = f"no result after {SECONDS} s" if process.is_alive() else "the process died"
        return {
            "package": op.package, "op": op.name, "version": version(op.package),
            "verdict": "not run", "reason": reason, "findings": [],
        }  # fmt: skip
    finally:
        process.kill()
        process.join()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wanted", nargs="*", help="parts of names of ops to validate again")
    parser.add_argument("--script", metavar="OP", help="print a script that validates one op")
    parser.add_argument("--page", action="store_true", help="only write docs/peers.md again")
    args = parser.parse_args(argv)
    if args.script:
        (op,) = (op for op in OPS if op.key == args.script)
        print(op.script(CHECKS))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if not args.page:
        for op in OPS:
            exec(op.imports, {"arange": torch.arange, "torch": torch})  # once for all processes
    for op in OPS:
        known = results.get(op.key, {}).get("version") == version(op.package)
        if args.page or (not any(w in op.key for w in args.wanted) if args.wanted else known):
            continue
        start = time.perf_counter()
        results[op.key] = in_a_process(op)
        print(
            f"{time.perf_counter() - start:6.1f} s  {op.key}: {results[op.key]['verdict']}",
            flush=True,
        )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(OPS, results))


if __name__ == "__main__":
    main()
