"""What :func:`validate` found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from textwrap import indent
from typing import Any

from .checks import CHECKS
from .curves import Curve
from .outcome import ENOUGH

#: every status, the worst first
STATUSES = ("wrong", "not offered", "not run", "right", "n/a")


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        check: its name.
        status: "right"; "wrong"; "not offered", where the code refuses clearly what it may do
            without; "not run", where this machine cannot run it; "n/a", where it says nothing about
            this call.
        detail: what it found, or why it has no result.
        example: the smallest inputs with which it is wrong, as a text that :func:`validate` takes.
        script: a program that shows it.
    """

    check: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    example: str = ""
    script: str = ""


@dataclass
class Report:
    """The results of :func:`validate`. Prints as a table.

    Attributes:
        name: its title.
        results: one for each check that was asked for.
        errors: dtype -> (our error against float64, the reference's own).
        notes: what was done to be able to run the checks.
        about: what was run, by what: the command, versions, the machine.
        curves: errors over the range of the inputs, of ``validate(plots=True)``.
        figures: check -> what it measured -> (ours, the reference's).
    """

    name: str
    results: list[Result] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    figures: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and something ran."""
        return self.verdict in ("right", "not offered")

    @property
    def verdict(self) -> str:
        """The worst that is known: "wrong" if any check is; else "right" if any is; else
        "not offered" or "not run"."""
        found = {r.status for r in self.results}
        order = ("wrong", "right", "not offered", "not run")
        return next((status for status in order if status in found), "not run")

    @property
    def failures(self) -> list[Result]:
        """The results that are wrong."""
        return self._with("wrong")

    @property
    def not_offered(self) -> list[Result]:
        """The results for what the code does not offer."""
        return self._with("not offered")

    def _with(self, status: str) -> list[Result]:
        return [r for r in self.results if r.status == status]

    def status(self, check: str) -> str:
        """The status of one check.

        Raises:
            KeyError: it was not run.
        """
        return {r.check: r.status for r in self.results}[check]

    def missing(self, require: Iterable[str]) -> list[Result]:
        """The results of those checks that must be right and are not. "all" means every check
        that the code does not offer or that is wrong.

        Raises:
            ValueError: there is no such check, or it was not asked for.
        """
        require = set(require)
        known = {r.check for r in self.results}
        if unknown := sorted(require - known - {"all"}):
            raise ValueError(f"no result of a check {unknown}: there are {sorted(known)}")
        return [
            r
            for r in self.results
            if (r.check in require and r.status != "right")
            or ("all" in require and r.status in ("wrong", "not offered"))
        ]

    def raise_if_failed(self, require: Iterable[str] = ()) -> Report:
        """Raises AssertionError with the whole report unless all is right; else returns it.

        Args:
            require: names of checks that must be right, and not only "not offered"; or "all".
        """
        require = (require,) if isinstance(require, str) else tuple(require)
        if not self.ok or self.missing(require):
            raise AssertionError(str(self))
        return self

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def to_json(self, **options: Any) -> str:
        """The report as JSON, with infinity and NaN as strings, since JSON has neither."""
        found = self.to_dict()
        found["errors"] = _as_json(self.errors)
        found["figures"] = {check: _as_json(of) for check, of in self.figures.items()}
        return json.dumps(found, **options)

    def to_markdown(self) -> str:
        """The verdict as Markdown, to paste into a pull request."""
        from .markdown import markdown

        return markdown(self)

    def to_html(self) -> str:
        """The report as one page that needs no other file: the verdict, each check with what it
        finds, the smallest inputs that fail with a script, and the errors as plots."""
        from .html import page

        return page(self)

    def to_junit(self) -> str:
        """The report as JUnit's XML: one test case a check. What is not offered, not run or not
        applicable is skipped."""
        from .junit import junit

        return junit(self)

    def merge(self, other: Report) -> None:
        """Adds the report of another case. A check is right if it is right on every case to which
        it applies; of :data:`~.outcome.ENOUGH`, if it is right on one."""
        merged = {r.check: r for r in self.results}
        for r in other.results:
            mine = merged.get(r.check)
            if mine is None:
                merged[r.check] = r
                continue
            worse = min(mine, r, key=lambda x: STATUSES.index(x.status))
            if r.check in ENOUGH and worse.status == "not run":
                worse = max(mine, r, key=lambda x: x.status == "right")
            merged[r.check] = replace(worse, seconds=mine.seconds + r.seconds)
        order = list(CHECKS)
        self.results = sorted(
            merged.values(), key=lambda r: order.index(r.check) if r.check in order else -1
        )
        self.notes += [note for note in other.notes if note not in self.notes]
        drawn = {c.title: c for c in self.curves}
        for curve in other.curves:
            drawn[curve.title] = drawn.get(curve.title, curve).worse(curve)
        self.curves = list(drawn.values())
        _keep_largest(self.errors, other.errors)
        for check, figures in other.figures.items():
            _keep_largest(self.figures.setdefault(check, {}), figures)

    def _errors(self) -> list[tuple[str, str, str]]:
        """The errors as text: (dtype, ours, the reference's own)."""
        return [(d, f"{ours:.1e}", f"{own:.1e}") for d, (ours, own) in self.errors.items()]

    def _measured(self) -> list[tuple[str, str, str]]:
        """The figures as text: (what, ours, the reference's)."""
        return [
            (f"{check} of {what}", f"{ours:.4g}", f"{theirs:.4g}")
            for check, figures in self.figures.items()
            for what, (ours, theirs) in figures.items()
        ]

    def __str__(self) -> str:
        counts = [f"{len(found)} {status}" for status in STATUSES if (found := self._with(status))]
        lines = [f"{self.name}: {self.verdict.upper()} ({', '.join(counts)})"]
        lines += [f"  note: {note}" for note in self.notes]
        shown = self.results
        if self.verdict == "not run" and len(shown) > 1 and len({r.detail for r in shown}) == 1:
            shown = [replace(shown[0], check="every check")]  # the one reason is said once
        for r in shown:
            first, *more = r.detail.splitlines() or [""]
            lines.append(f"  {r.status:<13}{r.check:<18}{first}")
            lines += [" " * 6 + line for line in more]
            if r.status == "wrong" and r.script:
                lines += ["", *indent(r.script, " " * 6).splitlines(), ""]
        lines += [
            f"  error in {d}: {ours} (the reference's own: {own})"
            for d, ours, own in self._errors()
        ]
        lines += [
            f"  {what}: {ours} (the reference's: {theirs})"
            for what, ours, theirs in self._measured()
        ]
        return "\n".join(line.rstrip() for line in lines)


#: what was measured -> (ours, the reference's)
Pairs = dict[str, tuple[float, float]]


def _as_json(pairs: Pairs) -> dict[str, list[float | str]]:
    return {what: [e if math.isfinite(e) else str(e) for e in pair] for what, pair in pairs.items()}


def _keep_largest(mine: Pairs, others: Pairs) -> None:
    for what, (ours, theirs) in others.items():
        before = mine.get(what, (0.0, 0.0))
        mine[what] = (max(before[0], ours), max(before[1], theirs))
