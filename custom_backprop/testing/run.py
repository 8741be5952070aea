"""Runs the checks on one case."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd.gradcheck import GradcheckError

from .case import Case
from .checks import CHECKS
from .outcome import FEATURES, NotApplicable, NotOffered, NotRun, Wrong
from .report import Report, Result


def applicable(names: Iterable[str] | None) -> dict[str, Callable[[Case], Any]]:
    """The checks of these names, or all.

    Raises:
        ValueError: an unknown name.
    """
    chosen = list(CHECKS) if names is None else list(names)
    unknown = [n for n in chosen if n not in CHECKS]
    if unknown:
        raise ValueError(f"unknown checks {unknown}: choose among {list(CHECKS)}")
    return {n: CHECKS[n] for n in chosen}


def run(case: Case, checks: Iterable[str] | None = None) -> Report:
    """The checks of these names (default: all) on one case."""
    report = Report(case.name)
    for name, function in applicable(checks).items():
        start = time.perf_counter()
        status, detail, found, script = _result(name, function, case)
        if name == "precision" and found:
            report.errors = found
        elif isinstance(found, dict) and found:
            report.figures[name] = found
        seconds = time.perf_counter() - start
        report.results.append(Result(name, status, detail, seconds, script=script))
    return report


def _result(name: str, function: Callable[[Case], Any], case: Case) -> tuple[str, str, Any, str]:
    """(status, detail, what the check returned, a script that shows it)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(case)
            return "right", found if isinstance(found, str) else "", found, ""
    except NotApplicable as reason:
        return "n/a", str(reason), None, ""
    except NotRun as reason:
        return "not run", str(reason), None, ""
    except NotOffered as reason:
        return "not offered", str(reason), reason.found, reason.script
    except (Wrong, GradcheckError) as error:
        return "wrong", _said(case, error), None, getattr(error, "script", "")
    except Exception as error:
        return "not offered" if name in FEATURES else "wrong", _said(case, error), None, ""


def _said(case: Case, error: Exception) -> str:
    return f"{case.name}: {type(error).__name__}: {error}"
