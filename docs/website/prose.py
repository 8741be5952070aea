"""Docstrings as MyST: prose with its formulas as mathematics, lines of formulas as equations."""

from __future__ import annotations

import inspect
import re
import textwrap

from . import notation

_CODE = re.compile(r"``(?P<code>[^`]+)``|:(?P<role>\w+):`(?P<target>[^`]+)`|`(?P<single>[^`]+)`")
_SPECIAL = re.compile(r"([\\`_\[\]<>$#~^]|(?<!\*)\*(?!\*))")
_GAP = re.compile(r"(?<=\S)\s{2,}(?=\S)")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Note)s?:$", re.MULTILINE)


def markdown(docstring: str, links: dict[str, str] | None = None) -> str:
    """A docstring. ``links``: what it refers to -> the page."""
    text = inspect.cleandoc(docstring)
    section = _SECTION.search(text)
    text = text[: section.start()].rstrip() if section else text
    return "\n\n".join(_block(block, links or {}) for block in re.split(r"\n\s*\n", text))


def _block(block: str, links: dict[str, str]) -> str:
    lines = block.split("\n")
    if all(line.startswith("    ") for line in lines):
        return equations(textwrap.dedent(block))
    for i, line in enumerate(lines):  # formulas right below their sentence
        if i and line.startswith("    ") and all(x.startswith("    ") for x in lines[i:]):
            rest = equations(textwrap.dedent("\n".join(lines[i:])))
            return f"{_block(chr(10).join(lines[:i]), links)}\n\n{rest}"
    if lines[0].startswith("- "):
        items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        return "\n".join("- " + textwrap.indent(prose(i, links), "  ").lstrip() for i in items)
    return prose(block, links)


def equations(text: str) -> str:
    """Lines of formulas as one equation, or the lines as they are if one of them is none."""
    try:
        rows = [
            [notation.translated(cell, words=True) for cell in _GAP.split(line.strip(" .,"))]
            for line in text.split("\n")
        ]
    except notation.NotMathematics:
        return f"```text\n{text}\n```"
    return equation(rows)


def equation(rows: list[list[str]]) -> str:
    """Cells of LaTeX as one equation."""
    if len(rows) == 1:
        return "```{math}\n" + r" \qquad ".join(rows[0]) + "\n```"
    columns = max(map(len, rows))
    body = " \\\\\n".join(r" & \quad ".join(row) for row in rows)
    return f"```{{math}}\n\\begin{{array}}{{{'l' * columns}}}\n{body}\n\\end{{array}}\n```"


def formula(line: str) -> str:
    """A spec's formula: forward and backward, each statement on a line, aligned at its sign."""
    try:
        rows = [
            re.sub(r" = ", " & = ", notation.translated(statement, words=True), count=1)
            for part in line.split(";  ")
            for statement in statements(part)
        ]
    except notation.NotMathematics:
        return f"```text\n{line}\n```"
    body = " \\\\\n".join(rows)
    return f"```{{math}}\n\\begin{{aligned}}\n{body}\n\\end{{aligned}}\n```"


def statements(part: str) -> list[str]:
    """A line cut at the commas that a definition follows."""
    found: list[str] = []
    depth = start = 0
    for i, c in enumerate(part):
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth and re.match(r"[^,(]*\w\S* = ", part[i + 1 :]):
            found.append(part[start:i])
            start = i + 1
    return [s.strip() for s in (*found, part[start:])]


def prose(text: str, links: dict[str, str] | None = None) -> str:
    """A paragraph: formulas become mathematics, names in quotes become code."""
    parts, last = [], 0
    for m in _CODE.finditer(text):
        parts += [_mathematics(text[last : m.start()]), _code(m, links or {})]
        last = m.end()
    return "".join([*parts, _mathematics(text[last:])])


def _code(m: re.Match[str], links: dict[str, str]) -> str:
    name = m["code"] or m["target"] or m["single"]
    name = name.removeprefix("~")
    return f"[`{name}`]({links[name]})" if name in links else f"`{name}`"


def _mathematics(text: str) -> str:
    return "".join(
        f"${piece.strip()}$" if formula else escaped(piece)
        for piece, formula in notation.inline(text)
    )


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", text)
