"""What is done so far, on stderr: on a terminal tqdm's bar, if it is installed; else, as in a log,
a line now and then."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


def progress(total: int, unit: str) -> Any:
    """A context manager with ``update()`` and ``set_postfix_str(text)``."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            return tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)
    return _Plain(total, unit)


class _Plain:
    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done, self.text = total, unit, 0, ""

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        self.text = text

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.done == self.total or self.done % 10 == 0:
            print(f"{self.done}/{self.total} {self.unit} {self.text}", file=sys.stderr)
