"""The results as a page of Markdown."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .case import BACKWARD, DIRECTIONS, FORWARD
from .results import Ratio, Row, ratios

ABOUT = """Fractions are of the ceilings, measured in the same run: the least time in which the card
could move the fewest bytes possible, and do the products, over the time. In parentheses: the time
of the best of stock, torch.compile and the peers, over the time of ours; **above 1 ours is
faster**. Times are the GPU's own, of CUDA graphs, with random inputs that are not in its L2 cache.
Losses have no backward alone, as the gradient is made in forward."""

#: what an op that only moves bytes should reach in bfloat16: direction, lengths of rows, fraction
GOALS = (
    (FORWARD, 4096, 2**15, 0.95),
    (FORWARD, 1024, 1024, 0.85),
    (FORWARD, 2**16, 2**18, 0.85),
    (BACKWARD, 1024, 2**18, 0.9),
)
#: so many that miss a goal are named
MANY = 12


def markdown(
    machine: dict[str, Any],
    rows: Sequence[Row],
    left: Sequence[str],
    command: str,
    pictures: Iterable[Path] = (),
) -> str:
    """The page."""
    parts = [
        f"# {machine['card']}",
        _wrapped("; ".join(f"{name}: {_said(value)}" for name, value in machine.items()) + "."),
        _wrapped(f"{ABOUT} Written by `{command}`."),
        *_summary(rows, left),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        *_lengths(rows),
        *_others(rows),
        *_host(rows),
        *_steps(rows),
        *_reasons(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    return str(value)


def _summary(rows: Sequence[Row], left: Sequence[str]) -> list[str]:
    lines = []
    for row in rows:
        if row.section == "ceilings" and row.status == "ok":
            rate = f"{row.tbps:.2f} TB/s" if row.tbps else f"{row.tflops:.1f} TFLOP/s"
            lines.append(f"- Ceiling, {row.op} of {row.dtype}: {rate}.")
    for section in ("graphs", "database"):
        found = Counter(row.status for row in rows if row.section == section)
        if found:
            counts = ", ".join(f"{count} {status}" for status, count in found.items())
            lines.append(f"- {TITLES[section]}: {counts}.")
    if left:
        lines.append(f"- The time was spent before {len(left)} cases; the next run goes on there.")
    return ["\n".join(_wrapped(line, "  ") for line in [*lines, *_goals(rows)])]


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    """How many reach each goal, and which do not."""
    ours = [row for row in rows if row.who == "ours" and row.fraction and not row.flops]
    for direction, shortest, longest, goal in GOALS:
        found = sorted(
            (row.fraction or 0.0, f"{row.op} {short(n)}")
            for row in ours
            if (row.dtype, row.direction) == ("bfloat16", direction)
            if (n := row.n) and shortest <= n <= longest
        )
        if not found:
            continue
        below = [f"{name} {fraction:.2f}" for fraction, name in found if fraction < goal]
        more = f" and {len(below) - MANY} more" if len(below) > MANY else ""
        lengths = " to ".join(dict.fromkeys((short(shortest), short(longest))))
        line = f"- Goal, {direction} of {lengths} at {goal}: {len(found) - len(below)} of "
        yield f"{line}{len(found)}{'; below: ' * bool(below)}{', '.join(below[:MANY])}{more}."


TITLES = {
    "graphs": "CUDA graphs, bit for bit like a second call",
    "database": "Checks of `custom_backprop check`, float64 gradcheck among them",
}


def _wrapped(text: str, indent: str = "") -> str:
    text = " ".join(text.split())
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(text + [f"| {' | '.join(line)} |" for line in lines])


def _cell(found: Ratio | None) -> str:
    if found is None:
        return ""
    fraction = f"{found.ours.fraction:.2f} " if found.ours.fraction else ""
    return f"{fraction}({found.ratio:.2f})"


def _lengths(rows: Sequence[Row]) -> list[str]:
    """A table for each dtype and direction, by the length of rows."""
    found = [r for r in ratios(rows) if r.ours.n]
    parts = []
    for dtype in dict.fromkeys(r.ours.dtype for r in found):
        for direction in DIRECTIONS:
            by = {
                (r.ours.op, r.ours.n): r
                for r in found
                if (r.ours.dtype, r.ours.direction) == (dtype, direction)
            }
            lengths = sorted({n for _, n in by if n})
            lines = [
                [op, *(_cell(by.get((op, n))) for n in lengths)]
                for op in dict.fromkeys(op for op, _ in by)
            ]
            if lines:
                parts += [f"## {dtype}, {direction}, by the length of rows"]
                parts += [_table([dtype or "", *map(short, lengths)], lines)]
    return parts


def short(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _others(rows: Sequence[Row]) -> list[str]:
    """One table of the ops whose speed does not depend on rows."""
    found = [r for r in ratios(rows) if not r.ours.n]
    by = {(r.ours.op, f"{r.ours.dtype} {r.ours.direction}"): r for r in found}
    columns = list(dict.fromkeys(column for _, column in by))
    lines = [
        [op, *(_cell(by.get((op, column))) for column in columns)]
        for op in dict.fromkeys(op for op, _ in by)
    ]
    return ["## Other ops", _table(["op", *columns], lines)] if lines else []


def _host(rows: Sequence[Row]) -> list[str]:
    found = ratios(rows, "host")
    by = {(r.ours.op, r.ours.direction): r for r in found}
    columns = list(dict.fromkeys(direction for _, direction in by))

    def cell(found: Ratio | None) -> str:
        return f"{1e6 * (found.ours.seconds or 0):.1f} ({found.ratio:.2f})" if found else ""

    lines = [
        [op, *(cell(by.get((op, column))) for column in columns)]
        for op in dict.fromkeys(op for op, _ in by)
    ]
    title = "## Small calls, one after another: microseconds"
    return [title, _table(["op", *map(str, columns)], lines)] if lines else []


def _steps(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.section == "steps" and row.status == "ok"]
    by = {(row.op, row.who): row for row in found}
    who = list(dict.fromkeys(row.who for row in found))

    def cell(row: Row | None) -> str:
        return f"{1e3 * (row.seconds or 0):.2f}, {(row.memory or 0) / 2**20:.0f}" if row else ""

    lines = [
        [op, *(cell(by.get((op, w))) for w in who)] for op in dict.fromkeys(r.op for r in found)
    ]
    title = "## A training step: milliseconds, and MiB at the peak"
    return [title, _table(["model", *who], lines)] if lines else []


def _reasons(rows: Sequence[Row]) -> list[str]:
    """What failed; and how many were skipped for which reason."""
    parts: list[str] = []
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        lines = [f"- {row.case} {row.direction or ''}: {row.reason}" for row in failed]
        parts += ["## Failed", "\n".join(_wrapped(line, "  ") for line in lines)]
    skipped = Counter(f"{row.who}: {row.reason}" for row in rows if row.status == "skipped")
    if skipped:
        lines = [f"- {reason} ({count})" for reason, count in skipped.items()]
        parts += ["## Skipped", "\n".join(_wrapped(line, "  ") for line in lines)]
    return parts
