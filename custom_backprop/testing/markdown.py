"""A report as Markdown, to paste into a pull request."""

from __future__ import annotations

from .report import STATUSES, Report, Result


def markdown(report: Report) -> str:
    """The verdict, a table with the checks, and for each that is wrong the smallest inputs and a
    script that shows it."""
    counts = [f"{len(of)} {status}" for status in STATUSES if (of := report._with(status))]
    parts = [f"### `{report.name}`: {report.verdict}", f"{', '.join(counts)}."]
    parts += [f"Note: {note}." for note in report.notes]
    parts.append(_table(report))
    if report.errors:
        parts.append(_beside("error against float64 in", report._errors()))
    if report.figures:
        parts.append(_beside("", report._measured()))
    parts += _wrong(report)
    if report.about:
        about = dict(report.about)
        command = about.pop("command", "")
        parts.append(", ".join(f"{name} {version}" for name, version in about.items()) + ".")
        if command:
            parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts)


def _table(report: Report) -> str:
    """One row for all checks with the same result."""
    rows: dict[tuple[str, str], list[str]] = {}
    for r in sorted(report.results, key=lambda r: STATUSES.index(r.status)):
        rows.setdefault((r.status, said(report, r)), []).append(r.check)
    lines = ["| | check | |", "|---|---|---|"]
    for (status, detail), checks in rows.items():
        word = f"**{status}**" if status == "wrong" else status
        lines.append(f"| {word} | {', '.join(checks)} | {_cell(detail)} |")
    return "\n".join(lines)


def _beside(what: str, rows: list[tuple[str, str, str]]) -> str:
    """Figures of this code beside the reference's."""
    lines = [f"| {what} | this code | the reference's own |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(text: str, most: int = 160) -> str:
    """The first line, as the cell of a table."""
    line = " ".join(text.strip().partition("\n\n")[0].split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    for character in "\\|*_<`":
        line = line.replace(character, "\\" + character)
    return line


def said(report: Report, r: Result) -> str:
    """The detail without what the report says already, nor gradcheck's advice."""
    text = r.detail.strip().removeprefix(f"{report.name}: ").removeprefix("Wrong: ")
    return text.partition("\n\nNOTE: If your op relies on non-deterministic")[0]


def _wrong(report: Report) -> list[str]:
    """What was found, and how to see it, which is written once for results with the same
    example."""
    parts: list[str] = []
    shown: dict[str, str] = {}
    for r in report.failures:
        parts += [f"#### {r.check}", f"```\n{said(report, r)}\n```"]
        script = r.script.replace(f'"{r.check}"', "")
        if script and script in shown:
            parts.append(f'To see it: the script of {shown[script]}, with `checks=["{r.check}"]`.')
            continue
        shown[script] = r.check
        if r.example:
            parts.append(f"The smallest inputs found: `{r.example}`")
        if r.script:
            parts.append(f"```python\n{r.script}\n```")
    return parts
