"""The command line: ``custom-backprop`` and ``python -m custom_backprop``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .cli import COMMANDS, INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0, or 1 where it found something wrong, or 130 where
    it was interrupted; bad arguments exit with 2.

    Only the module of that command is imported, and with it torch.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="custom-backprop", description="Backpropagation written out, proved, and looked into."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    wanted = next((a for a in arguments if a in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary)
        if name == wanted:
            module = import_module(f".cli.{name}", __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run, arguments=arguments)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
