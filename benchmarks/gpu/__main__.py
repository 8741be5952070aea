"""``python -m benchmarks.gpu``: all that there is to measure on a card, in one process of less than
ten minutes.

The ceilings of the card; each op against stock, torch.compile and the peers that are installed; the
host's time of a call; training steps of a GPT and a ViT-B; CUDA graphs of each op; and the checks
of the database on the card's own kernels.

What no clock looks at, and a first call that compiles what is timed, run before that in as many
processes as there are cores to spare. Then cases run one at a time.

Each case is written to the file of results as it ends. The same command goes on where the last one
was interrupted, or where its minutes were spent, unless the machine, a version or our sources
changed. Then it starts again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from custom_backprop.cli.progress import progress
from custom_backprop.testing import OpSpec
from custom_backprop.testing.database import named

from ..report import RESULTS
from . import ahead, ceilings
from .case import Case
from .ceilings import Ceilings
from .device import Card, DryRun
from .page import markdown
from .peers import Peer, peers
from .results import Row, Store
from .run import CardLost, run
from .sections import SHARES, sections

#: of the time, for what no clock looks at
AHEAD = 0.5
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a case failed, 130 after an interruption."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="an op or a family; default: all")
    parser.add_argument(
        "--sections", nargs="+", choices=SHARES, default=list(SHARES), help="default: all"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="no case begins that may end later; default: %(default)s",
    )
    parser.add_argument(
        "--again", action="store_true", help="also the cases that failed or were skipped"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on a CPU, at toy sizes, in Triton's interpreter, to see that everything runs",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("this needs a GPU, and none is visible; --dry-run does without")
    try:
        specs = named(args.ops)
    except ValueError as error:
        parser.error(str(error))
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    until = time.perf_counter() + 60 * args.minutes
    with _folder(args) as out, _terminated_as_interrupted():
        device = DryRun() if args.dry_run else Card()
        with device.ready():
            return _measure(device, specs, args, out / f"gpu-{device.name}.json", command, until)


def _measure(
    device: Card,
    specs: Sequence[OpSpec],
    args: argparse.Namespace,
    file: Path,
    command: str,
    until: float,
) -> int:
    found = peers()
    store = Store(file, device.machine(found), command)
    if args.again:
        store.forget()
    first = {"ceilings": ceilings.cases(device), "peers": _absent(found)}
    every = sections(device, specs, found, lambda: Ceilings.of(store.rows))
    rest = {name: cases for name, cases in every.items() if name in args.sections}
    done = store.done()
    count = sum(case.key not in done for part in (first, rest) for c in part.values() for case in c)
    code = 0
    with progress(count, "case") as bar:

        def tell(key: str) -> None:
            bar.set_postfix_str(key)
            bar.update()

        try:
            run(first, SHARES, store, device, until, tell)
            soon = time.perf_counter() + AHEAD * (until - time.perf_counter())
            ahead.run(rest, store, device, args.ops, soon, tell)
            run(rest, SHARES, store, device, until, tell)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except CardLost as error:
            print(f"\nthe card was lost in {error}", file=sys.stderr)
    write(store)
    failed = [row for row in store.rows if row.status == "failed"]
    for row in failed:
        print(f"FAILED {row.case} {row.who} {row.direction or ''}: {row.reason}", file=sys.stderr)
    if store.left:
        print(f"{len(store.left)} cases are left: run it again to go on", file=sys.stderr)
    print(f"wrote {file.with_suffix('')}.*", file=sys.stderr)
    return code or int(bool(failed))


def write(store: Store) -> None:
    """The page and the figures of a store."""
    from . import figures

    pictures = []
    with suppress(ImportError):  # matplotlib
        pictures = figures.draw(store.machine, store.rows, store.file)
    page = markdown(store.machine, store.rows, store.left, store.command, pictures)
    store.file.with_suffix(".md").write_text(page, encoding="utf-8")


def _absent(found: Sequence[Peer]) -> list[Case]:
    """One row for each peer that is not here."""
    return [
        Case(row, lambda row=row: [row])  # type: ignore[misc]
        for peer in found
        if peer.reason
        for row in [Row("peers", peer.name, peer.name).because("skipped", peer.reason)]
    ]


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """Where the results go: those of a dry run nowhere, unless somebody asks for them."""
    if args.out or not args.dry_run:
        yield args.out or RESULTS
        return
    with tempfile.TemporaryDirectory() as out:
        yield Path(out)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Whoever ends the process with SIGTERM gets the page, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
