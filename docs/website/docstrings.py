"""Docstrings as autodoc shows them: their plain formulas as mathematics, and the arguments of a
function that its module describes for the whole family."""

from __future__ import annotations

import re
import sys
from typing import Any

from sphinx.application import Sphinx

from . import notation

_QUOTED = re.compile(r"``[^`]+``|:[\w:]+:`[^`]+`|`[^`]+`_?|\*\*\S[^*]*\*\*")
_FIELD = re.compile(r"^\s*(?::\w+[^:`]*:|\.\. .*|[-*] )?\s*")
_BORDER = re.compile(r"\s*(=+ +)+=+\s*$")
_LITERAL = re.compile(r"\s*\.\. code(-block)?::")
_SPECIAL = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")
#: a family's description stands in its module
FAMILIES = ("custom_backprop.functional.",)


def described(name: str, what: str, obj: Any, lines: list[str]) -> None:
    """Adds the arguments that the module describes to a function that describes none."""
    module = getattr(obj, "__module__", "") or ""
    if what != "function" or not module.startswith(FAMILIES):
        return
    if not any(line.strip() in ("Args:", "Raises:", "Returns:") for line in lines):
        text = (sys.modules[module].__doc__ or "").strip().split("\n")
        lines += ["", *text, ""]


def joined(lines: list[str]) -> list[str]:
    """Names of arguments that share a description, and do not fit in a line, in one."""
    found: list[str] = []
    names = False
    for line in lines:
        if names and found:
            found[-1] = f"{found[-1]} {line.strip()}"
        else:
            found.append(line)
        names = bool(re.fullmatch(r"\s+(\w+, ?)+", found[-1]))
    return found


def restructured(lines: list[str]) -> list[str]:
    """Lines of reStructuredText, in which plain formulas have become mathematics and no other
    character has a meaning by accident."""
    found: list[str] = []
    literal, table = -1, False
    for line in _paragraphs(lines):
        indent = len(line) - len(line.lstrip())
        if literal >= 0 and line.strip() and indent <= literal:
            literal = -1
        table = bool(line.strip()) and (table or bool(_BORDER.match(line)))
        as_it_is = literal >= 0 or table or bool(_LITERAL.match(line))
        found.append(line if as_it_is else _line(line))
        if literal < 0 and (line.rstrip().endswith("::") or _LITERAL.match(line)):
            literal = indent
    return found


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines with those of a paragraph in one, as a formula may go on in the next line."""
    found: list[str] = []
    literal = False
    for line in lines:
        before = found[-1] if found else ""
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            literal = literal or before.endswith("::") or bool(_LITERAL.match(before))
        elif not indent:
            literal = False
        goes_on = before.strip() and line.strip() and not literal and not _BORDER.match(line)
        if (
            goes_on
            and indent == len(before) - len(before.lstrip())
            and not _BORDER.match(before)
            and not before.lstrip().startswith((":", "..", "- ", "* "))
            and not line.lstrip().startswith((":", "..", "- ", "* ", "==", "--", "|", "+", "#"))
        ):
            found[-1] = f"{before.rstrip()} {line.lstrip()}"
        else:
            found.append(line)
    return found


def _line(line: str) -> str:
    start = _FIELD.match(line)
    assert start is not None
    parts, last = [start[0]], start.end()
    for m in _QUOTED.finditer(line, last):
        parts += [_plain(line[last : m.start()]), m[0]]
        last = m.end()
    return "".join([*parts, _plain(line[last:])])


def _plain(text: str) -> str:
    """A role must have a space or a sign on both sides: ``\\ `` is one that is not shown."""
    return "".join(
        f"\\ :math:`{piece.strip()}`\\ " if formula else _SPECIAL.sub(r"\\\1", piece)
        for piece, formula in notation.inline(text)
    )


def _before(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    described(name, what, obj, lines)
    lines[:] = joined(lines)


def _after(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _before, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _after, priority=900)
