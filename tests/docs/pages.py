"""Reads the code that a page shows, and compares the output that it shows with what was printed.

A block of text after a block of Python, or after a command, is its output. Words must be equal,
except for white space, and so must whole numbers. Decimals may differ by one in the last digit
shown, since processors add in different orders. A number after ``~`` may differ by a factor of ten.
"""

from __future__ import annotations

import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"((?<![\w.])~?-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_END = "<end of block {}>"


class Shown(NamedTuple):
    """Code, and the output shown under it, or None."""

    code: str
    output: str | None


def python_blocks(page: str) -> list[Shown]:
    """The blocks of Python, in their order."""
    blocks = [(m[1], m[2]) for m in _BLOCK.finditer(page)]
    after = [*blocks[1:], ("", "")]
    return [
        Shown(text, follows if kind == "text" else None)
        for (language, text), (kind, follows) in zip(blocks, after, strict=True)
        if language == "python"
    ]


def commands(page: str) -> list[Shown]:
    """The blocks that start with a command after ``$``."""
    texts = [m[2] for m in _BLOCK.finditer(page) if m[2].startswith("$ ")]
    return [Shown(*text[2:].split("\n", 1)) for text in texts]


def script(blocks: list[Shown]) -> str:
    """One program made of all blocks. It prints a mark after the output of each."""
    return "\n".join(f"{b.code}\nprint({_END.format(i)!r})\n" for i, b in enumerate(blocks))


def outputs(printed: str, count: int) -> list[str]:
    """What each block of :func:`script` printed."""
    found = []
    for i in range(count):
        output, printed = printed.split(_END.format(i) + "\n", 1)
        found.append(output)
    return found


def agree(shown: str, printed: str) -> bool:
    """Whether ``printed`` agrees with what the page shows."""
    mine, theirs = (_NUMBER.split(" ".join(text.split())) for text in (shown, printed))
    return len(mine) == len(theirs) and all(
        _close(a, b) if i % 2 else a == b for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
    )


def _close(shown: str, printed: str) -> bool:
    if shown.startswith("~"):
        a, b = float(shown[1:]), float(printed)
        return a * b > 0 and 0.1 <= a / b <= 10
    last = Decimal(shown).as_tuple().exponent
    whole = isinstance(last, int) and last >= 0 and "e" not in shown
    apart = abs(Decimal(shown) - Decimal(printed))
    return apart == 0 if whole else apart <= Decimal(10) ** last


if __name__ == "__main__":  # python tests/docs/pages.py docs/backpropagation.md, for its picture
    page = Path(sys.argv[1]).resolve()
    os.chdir(page.parent)
    exec("\n".join(b.code for b in python_blocks(page.read_text(encoding="utf-8"))))
