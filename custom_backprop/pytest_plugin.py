"""The pytest plugin: the mark ``validate`` and the fixture ``validate``.

One test for each check, of a function of anybody::

    @pytest.mark.validate([(torch.randn(3, 5),)], reference=torch.nn.functional.silu)
    def test_silu(validate):
        validate(my_silu)

runs as ``test_silu[gradient]``, ``test_silu[gradcheck]`` and so on. What the function does not
offer is skipped, with the reason. Without the mark the fixture runs all checks in one test::

    def test_silu(validate):
        validate(my_silu, torch.randn(3, 5), torch.nn.functional.silu)

pytest finds the plugin where custom_backprop is installed. It imports nothing until a test uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import Report

MARK = (
    "validate(samples, reference=None, *, checks=None, require=(), **options): one test for each "
    "check of custom_backprop.testing. samples: a list of inputs (a tensor, a tuple, a Sample or a "
    "text), "
    "or by keyword a function that returns one. require: names of checks that may not be skipped "
    "as not offered, or 'all'. options: those of custom_backprop.testing.validate. The test calls "
    "the fixture validate with the function."
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("validate")
    if mark is None:
        return
    where = metafunc.definition.nodeid
    if "validate" not in metafunc.fixturenames:
        raise pytest.UsageError(f"{where} is marked validate, but does not take this fixture")
    samples, *_ = mark.args or (mark.kwargs.get("samples"),)
    if samples is None or len(mark.args) > 2:
        raise pytest.UsageError(f"{where}: validate(samples, reference=None, ...)")
    from .testing import CHECKS

    names = list(mark.kwargs.get("checks") or CHECKS)
    if unknown := [n for n in names if n not in CHECKS]:
        raise pytest.UsageError(f"{where}: no check {unknown}, there are {list(CHECKS)}")
    metafunc.parametrize("validate", names, indirect=True, ids=names)


@pytest.fixture
def validate(request: pytest.FixtureRequest) -> Callable[..., Report | None]:
    """``validate(function)``: under the mark one check, on all its samples. Otherwise
    ``validate(function, inputs, reference, require=(), **options)``: all checks, and the report."""
    mark = request.node.get_closest_marker("validate")
    return _all_checks if mark is None else _OneCheck(request.param, mark)


def _all_checks(
    function: Any, inputs: Any, reference: Any = None, *, require: Any = (), **options: Any
) -> Report:
    """custom_backprop.testing.validate; the test fails unless all is right."""
    from .testing import validate

    __tracebackhide__ = True
    report = validate(function, inputs, reference, **options)
    if not report.ok or report.missing(require):
        pytest.fail(str(report), pytrace=False)
    return report


class _OneCheck:
    """What the fixture is under the mark."""

    def __init__(self, check: str, mark: pytest.Mark) -> None:
        options = dict(mark.kwargs)
        given = [options.pop("samples")] if "samples" in options else []
        self.samples, self.reference = (*mark.args, *given, options.pop("reference", None))[:2]
        self.check, self.require = check, options.pop("require", ())
        options.pop("checks", None)
        self.options = options

    def __call__(self, function: Any) -> None:
        """Runs the check on every sample."""
        from .testing import Report, validate

        __tracebackhide__ = True
        samples = self.samples() if callable(self.samples) else self.samples
        if not isinstance(samples, list):
            samples = [samples]
        report = Report(getattr(function, "__name__", type(function).__name__))
        for sample in samples:
            options = {**self.options, "checks": ["float64", self.check]}
            report.merge(validate(function, sample, self.reference, **options))
        status = {r.check: r for r in report.results}
        if status["float64"].status == "not run":
            pytest.fail(f"it cannot run: {status['float64'].detail}", pytrace=False)
        result = status[self.check]
        if self.check != "float64":
            report.results.remove(status["float64"])
        required = "all" in _names(self.require) or self.check in _names(self.require)
        if result.status == "wrong" or (required and result.status != "right"):
            pytest.fail(str(report), pytrace=False)
        if result.status != "right":
            pytest.skip(f"{result.status}: {result.detail}")


def _names(require: Any) -> set[str]:
    return {require} if isinstance(require, str) else set(require)
