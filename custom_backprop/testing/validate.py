"""``validate``: all checks that a backward written by hand must pass, in one call, for any
Function, kernel or module."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .case import Case, is_float, of_module
from .checks import NotApplicable, Skipped, applicable

SYMBOL = {"pass": "ok", "fail": "FAIL", "skipped": "skipped", "n/a": "-"}


@dataclass(frozen=True)
class Result:
    """The result of one check: ``status`` is "pass", "fail", "skipped" or "n/a"; ``detail`` says
    what it found, what it left out, or why it does not apply."""

    check: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """The results of :func:`validate`. Prints as a table."""

    name: str
    results: list[Result] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """dtype -> (our error against float64, the reference's own)"""

    @property
    def passed(self) -> bool:
        return all(r.status != "fail" for r in self.results)

    def status(self, check: str) -> str:
        """The status of one check: "pass", "fail", "skipped" or "n/a".

        Raises:
            KeyError: it was not run.
        """
        return {r.check: r.status for r in self.results}[check]

    def raise_if_failed(self) -> Report:
        """Raises AssertionError with the whole report if any check failed; else returns it."""
        if not self.passed:
            raise AssertionError(str(self))
        return self

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def to_json(self, **options: Any) -> str:
        """The report as JSON, with infinity and NaN as strings, since JSON has neither."""
        found = self.to_dict()
        found["errors"] = {
            dtype: [e if math.isfinite(e) else str(e) for e in pair]
            for dtype, pair in self.errors.items()
        }
        return json.dumps(found, **options)

    def merge(self, other: Report) -> None:
        """Adds the report of another case. A check passes if it passes on every case to which it
        applies."""
        merged = {r.check: r for r in self.results}
        for r in other.results:
            mine = merged.get(r.check)
            if mine is None:
                merged[r.check] = r
                continue
            worse = min(mine, r, key=lambda x: ("fail", "skipped", "pass", "n/a").index(x.status))
            merged[r.check] = Result(r.check, worse.status, worse.detail, mine.seconds + r.seconds)
        self.results = list(merged.values())
        for dtype, (ours, theirs) in other.errors.items():
            before = self.errors.get(dtype, (0.0, 0.0))
            self.errors[dtype] = (max(before[0], ours), max(before[1], theirs))

    def __str__(self) -> str:
        lines = [f"{self.name}: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  {SYMBOL[r.status]:<8}{r.check:<18}{r.detail}" for r in self.results]
        lines += [
            f"  error in {d}: {ours:.1e} (the reference's own: {theirs:.1e})"
            for d, (ours, theirs) in self.errors.items()
        ]
        return "\n".join(lines)


def validate(
    fn_or_module: Callable[..., Any] | nn.Module,
    inputs: Tensor | Sequence[Any],
    reference: Callable[..., Any] | nn.Module | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    checks: list[str] | None = None,
    double_backward: bool = True,
    low_precision: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    inductor: bool = False,
    elementwise: bool = False,
    name: str | None = None,
) -> Report:
    """Proves a backward against torch.

    Args:
        fn_or_module: a function of tensors (``MyFunction.apply``, a kernel's wrapper), or a module,
            whose parameters are then differentiated as well.
        inputs: the positional arguments, or a single tensor. Floating-point tensors are converted
            to float64. Those that require grad are differentiated (all of them if none does). They
            should be small, a few dozen elements: gradcheck evaluates the function twice per
            element.
        reference: the same function by stock torch (with the same parameters, if both are modules).
            Without it, the checks that need an oracle do not apply.
        kwargs: keyword arguments of every call. Their tensors that require grad are differentiated
            as well.
        checks: names of :data:`custom_backprop.testing.CHECKS`. Default: all.
        double_backward: False states that there is no second derivative, and requesting one must
            raise.
        low_precision: the dtypes in which the error against float64 must not exceed the reference's
            own.
        inductor: also compile with Inductor, which needs a C++ compiler and some seconds.
        elementwise: states that each element of the result depends only on the same element of the
            one differentiated tensor. Every 16-bit number is then tried.
        name: the report's title.

    Returns:
        a :class:`Report`, to print, to serialise, or to assert with ``.raise_if_failed()``.

    Raises:
        TypeError: no input is a floating-point tensor, or one is a list or dict of tensors, which
            would not be differentiated.
        ValueError: an unknown check, or ``elementwise`` with several differentiated tensors.
    """
    title = name or getattr(fn_or_module, "__name__", None) or type(fn_or_module).__name__
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not any(is_float(a) and a.requires_grad for a in args):
        args = tuple(a.detach().requires_grad_() if is_float(a) else a for a in args)
    function: Callable[..., Any] = fn_or_module
    if isinstance(fn_or_module, nn.Module):
        function, reference, args = of_module(fn_or_module, reference, args)
    if any(
        is_float(t)
        for a in (*args, *(kwargs or {}).values())
        if not isinstance(a, Tensor)
        for t in tree_leaves(a)
    ):
        raise TypeError(
            "validate differentiates tensors that are arguments by themselves: take them out of "
            "lists, tuples and dicts"
        )
    if not any(map(is_float, args)):
        raise TypeError(
            "validate needs a floating-point tensor among the inputs, got "
            f"{[type(a).__name__ for a in args]}"
        )
    function, reference, args, kwargs = _positional(function, reference, args, kwargs or {})
    case = Case(
        function,
        reference,
        args,
        kwargs,
        title,
        double_backward=double_backward,
        low_precision=low_precision,
        inductor=inductor,
        elementwise=elementwise,
    ).to(torch.float64)
    if elementwise and len(case.wanted) != 1:
        raise ValueError(
            f"an elementwise function has one differentiated tensor, not {len(case.wanted)}"
        )
    return run(case, checks)


def _positional(
    function: Any, reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """The same call with differentiated keyword arguments after the positional ones."""
    names = [name for name, value in kwargs.items() if is_float(value) and value.requires_grad]
    if not names:
        return function, reference, args, kwargs

    def moved(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *all_, **rest: of(
            *all_[: len(args)], **dict(zip(names, all_[len(args) :], strict=True)), **rest
        )

    rest = {name: value for name, value in kwargs.items() if name not in names}
    return (
        moved(function),
        reference and moved(reference),
        (*args, *(kwargs[name] for name in names)),
        rest,
    )


def run(case: Case, checks: list[str] | None = None) -> Report:
    """The checks of these names (default: all) on one case."""
    report = Report(case.name)
    for check, function in applicable(checks).items():
        start = time.perf_counter()
        status, detail = "pass", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = function(case)
            if check == "precision":
                report.errors = found
        except NotApplicable as reason:
            status, detail = "n/a", str(reason)
        except Skipped as left_out:
            status, detail = "skipped", str(left_out)
        except Exception as error:
            status, detail = "fail", f"{case.name}: {type(error).__name__}: {error}"
        report.results.append(Result(check, status, detail, time.perf_counter() - start))
    return report
