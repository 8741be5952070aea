"""A report as one page of HTML that needs no other file and no network."""

from __future__ import annotations

import inspect
import math
import re
from html import escape

from .checks import CHECKS
from .curves import Curve
from .markdown import said
from .report import STATUSES, Report, Result


def page(report: Report) -> str:
    """The verdict, what failed and how to see it, the errors as plots, and every check."""
    counts = [f"{len(of)} {status}" for status in STATUSES if (of := report._with(status))]
    about = dict(report.about)
    command = about.pop("command", "")
    parts = [
        f'<header><h1><code>{escape(report.name)}</code> <span class="{_class(report.verdict)}">'
        f"{report.verdict}</span></h1>",
        f"<p>{', '.join(counts)}</p>",
        *(f"<p>Note: {escape(note)}.</p>" for note in report.notes),
        "</header>",
    ]
    if report.failures:
        parts += ["<h2>What is wrong</h2>", *(_wrong(report, r) for r in report.failures)]
    if report.errors:
        parts += [
            "<h2>Largest error against float64</h2>",
            "<p>Relative to the largest true value, over outputs and gradients.</p>",
            _beside("dtype", report._errors()),
        ]
    if report.figures:
        parts += [
            "<h2>Figures</h2>",
            "<p>Of memory in bytes, of accuracy in units in the last place.</p>",
            _beside("of", report._measured()),
        ]
    if report.curves:
        parts += ["<h2>Errors in units in the last place</h2>", _plots(report.curves)]
    parts += ["<h2>Every check</h2>", *(_check(report, r) for r in report.results)]
    if about:
        versions = ", ".join(f"{name} {version}" for name, version in about.items())
        parts.append(f"<footer><p>{escape(versions)}</p>")
        if command:
            parts.append(f"<pre>{escape(command)}</pre>")
        parts.append("</footer>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.name)}: {report.verdict}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>"
    )


def _class(status: str) -> str:
    return "chip " + re.sub(r"\W", "-", status)


def _wrong(report: Report, r: Result) -> str:
    detail = f'<pre class="said">{escape(said(report, r))}</pre>'
    found = f"<section><h3>{r.check}</h3>{_docstring(r.check)}{detail}"
    if r.example:
        found += f"<p>The smallest inputs found: <code>{escape(r.example)}</code></p>"
    if r.script:
        found += f"<p>This shows it:</p><pre>{escape(r.script)}</pre>"
    return found + "</section>"


def _check(report: Report, r: Result) -> str:
    detail = said(report, r)
    first = detail.partition("\n")[0]
    found = (
        f'<details><summary><span class="{_class(r.status)}">{r.status}</span> <b>{r.check}</b>'
        f' <span class="first">{escape(first)}</span>'
        f'<span class="seconds">{r.seconds:.1f} s</span></summary>{_docstring(r.check)}'
    )
    return found + (f'<pre class="said">{escape(detail)}</pre>' if detail else "") + "</details>"


def _docstring(check: str) -> str:
    """What the check is for, as it says itself."""
    text = inspect.getdoc(CHECKS[check]) if check in CHECKS else ""
    text = (text or "").partition("\n\nReturns:")[0]
    paragraphs = re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text)).split("\n\n")
    return "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs if paragraph)


def _beside(what: str, rows: list[tuple[str, str, str]]) -> str:
    """Figures of this code beside the reference's."""
    head = f"<tr><th>{what}</th><th>this code</th><th>the reference's own</th></tr>"
    cells = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _plots(curves: list[Curve]) -> str:
    both = any(c.theirs for c in curves)
    elementwise = curves[0].axis == "x"
    text = (
        "Each point is the largest error between two powers of two, over every 16-bit number."
        if elementwise
        else "The argument is multiplied by powers of two; errors are in units of the largest true "
        "value."
    )
    legend = '<span class="key ours"></span> this code'
    if both:
        legend += ' <span class="key theirs"></span> the reference in the same dtype'
    if any(None in (*c.ours, *c.theirs) for c in curves):
        legend += " × infinite or NaN, and the truth is a number"
    figures = "".join(f"<figure>{plot(c)}</figure>" for c in curves)
    return f'<p>{text}</p><p class="legend">{legend}</p><div class="plots">{figures}</div>'


#: the plot's size, and its margins: left, right, top, bottom
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 40
#: errors below this are drawn there
LEAST = 0.01


def plot(curve: Curve) -> str:
    """A curve as SVG."""
    positions = [_position(x) for x in curve.x] if curve.axis == "x" else list(map(_log2, curve.x))
    first, last = min(positions), max(positions)
    finite = [e for e in (*curve.ours, *curve.theirs) if e is not None]
    top = max(1, math.ceil(math.log10(max([*finite, LEAST])) + 0.4))
    bottom = round(math.log10(LEAST))

    def across(position: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (position - first) / ((last - first) or 1)

    def up(error: float) -> float:
        share = (math.log10(max(error, LEAST)) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.title)}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(curve.title)}</text>',
    ]
    step = max(1, (top - bottom) // 5)
    for power in range(bottom, top + 1, step):
        y = up(10.0**power)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        label = f"{10.0**power:g}" if power > bottom else f"≤ {LEAST:g}"
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{label}</text>')
    for position, label in _ticks(curve, first, last):
        x = across(position)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{label}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="x" x="{middle}" y="{HEIGHT - 6}">{escape(curve.axis)}</text>')
    for name, errors in (("ours", curve.ours), ("theirs", curve.theirs)):
        for run in _runs(positions, errors):
            points = " ".join(f"{across(p):.1f},{up(e):.1f}" for p, e in run)
            parts.append(f'<polyline class="{name}" points="{points}"/>')
        for p, e in zip(positions, errors, strict=False):
            if e is None:
                parts.append(f'<text class="{name} bad" x="{across(p):.1f}" y="{TOP + 4}">×</text>')
    measured = zip(curve.ours, positions, curve.x, strict=True)
    worst = max(((e, p, x) for e, p, x in measured if e is not None), default=None)
    if worst is not None:
        e, p, x = worst
        side = "end" if across(p) > WIDTH / 2 else "start"
        shift = -7 if side == "end" else 7
        parts.append(
            f'<circle class="ours" cx="{across(p):.1f}" cy="{up(e):.1f}" r="3.5"/>'
            f'<text class="worst" text-anchor="{side}" x="{across(p) + shift:.1f}" '
            f'y="{max(up(e) - 6, TOP - 2):.1f}">{e:.3g} near {x:.3g}</text>'
        )
    return "".join([*parts, "</svg>"])


def _log2(x: float) -> float:
    return math.log2(abs(x)) if x else -math.inf


#: numbers below 2**SMALLEST are drawn together, beside 0
SMALLEST = -24


def _position(x: float) -> float:
    """Where a number is drawn: by its exponent, the negative ones to the left."""
    return math.copysign(max(_log2(x) - SMALLEST, 0.0), x)


def _ticks(curve: Curve, first: float, last: float) -> list[tuple[float, str]]:
    if curve.axis != "x":
        powers = range(math.ceil(first), math.floor(last) + 1, 4)
        return [(power, _power(power)) for power in powers]
    found = [(0.0, "0")]
    step = 8 if last < 60 else 40
    for power in range(SMALLEST + step, int(last) + SMALLEST + 1, step):
        found += [(power - SMALLEST, _power(power)), (SMALLEST - power, "−" + _power(power))]
    return [(p, label) for p, label in found if first <= p <= last]


def _power(power: int) -> str:
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if power == 0 else f"2{digits}"


Points = list[tuple[float, float]]


def _runs(positions: list[float], errors: tuple[float | None, ...]) -> list[Points]:
    """The points between those where there is no error to draw."""
    runs: list[Points] = [[]]
    for p, e in zip(positions, errors, strict=False):
        if e is None:
            runs.append([])
        else:
            runs[-1].append((p, e))
    return [run for run in runs if run]


STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #16181d; --quiet: #5d636f;
  --line: #dfe1e6; --box: #f2f3f5; --ours: #2a6fdb; --theirs: #b45f06; --right: #1a7f45;
  --wrong: #c42b2b; --other: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --text: #e8eaee; --quiet: #a2a9b5;
  --line: #343842; --box: #1f2228; --ours: #6aa5ff; --theirs: #f0a04b; --right: #3fb970;
  --wrong: #ff7b72; --other: #9aa1ad; } }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
code, pre { font: 0.88em/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--box); padding: 0.7rem 0.9rem; overflow-x: auto; border-radius: 6px; }
pre.said { white-space: pre-wrap; }
section { border-left: 3px solid var(--wrong); padding-left: 1rem; margin: 1.2rem 0; }
details { border-top: 1px solid var(--line); padding: 0.35rem 0; }
details p { color: var(--quiet); margin: 0.5rem 0; }
summary { cursor: pointer; display: flex; gap: 0.6rem; align-items: baseline; }
summary .first { color: var(--quiet); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; flex: 1; }
.seconds { color: var(--quiet); font-variant-numeric: tabular-nums; white-space: nowrap; }
.chip { border: 1px solid currentColor; border-radius: 99px; padding: 0 0.55em; font-size: 0.8rem;
  white-space: nowrap; color: var(--other); min-width: 5.2em; text-align: center; }
h1 .chip { font-size: 1.1rem; } .chip.right { color: var(--right); }
.chip.wrong { color: var(--page); background: var(--wrong); border-color: var(--wrong); }
table { border-collapse: collapse; } td, th { padding: 0.2rem 1.2rem 0.2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0.8rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
svg .title { fill: var(--text); font-size: 13px; font-weight: 600; }
svg .x { text-anchor: middle; } svg .y { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg polyline.ours { stroke: var(--ours); }
svg polyline.theirs { stroke: var(--theirs); stroke-dasharray: 6 6; }
svg circle.ours { fill: var(--ours); stroke: var(--page); stroke-width: 1.5; }
svg .worst { fill: var(--text); } svg .bad { text-anchor: middle; font-weight: 700; }
svg .bad.ours { fill: var(--ours); } svg .bad.theirs { fill: var(--theirs); }
.legend { color: var(--quiet); } .key { display: inline-block; width: 1.6em; height: 0;
  vertical-align: middle; border-top: 2px solid var(--ours); }
.key.theirs { border-top: 2px dashed var(--theirs); margin-left: 1em; }
footer { margin-top: 2.5rem; color: var(--quiet); }
"""
