"""The command line: ``python -m custom_backprop {check,cost,info,kernels}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .cli import check, cost, info, kernels
from .cli.work import INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, or 1 where it found something wrong, or 130 where
    it was interrupted; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m custom_backprop",
        description="Backpropagation written out, proved, and looked into.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (check, cost, info, kernels):
        command.add_parser(subparsers).set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
