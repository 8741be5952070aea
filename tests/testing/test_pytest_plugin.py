"""The pytest plugin, in runs of pytest inside this one."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from custom_backprop.testing import validate

pytest_plugins = "pytester"

#: registered by its import name, whether or not the package is installed
OPTIONS = ("-p", "no:custom_backprop", "-p", "custom_backprop.pytest_plugin", "-p", "no:benchmark",
           "-p", "no:cacheprovider", "-W", "error", "--strict-markers")  # fmt: skip

HEAD = """
import pytest
import torch
from torch.nn import functional as F
from custom_backprop.testing import Sample

CHECKS = ["forward", "gradient", "strides", "forward_mode"]


class Silu(torch.autograd.Function):
    slope = 1.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return dy * s * (1 + x * (1 - s)) * Silu.wrong(dy)

    @staticmethod
    def wrong(dy):
        return 1.0
"""


@pytest.fixture(scope="module")
def _imported():
    """What the runs inside import, which forget the modules that are new to them."""
    checks = ["forward", "gradient", "gradcheck", "strides", "forward_mode"]
    validate(torch.nn.functional.silu, torch.randn(3), torch.nn.functional.silu, checks=checks)


@pytest.fixture
def run(_imported, pytester):
    def run(tests, *options):
        pytester.makepyfile(HEAD + tests)
        return pytester.runpytest_inprocess(*OPTIONS, *options)

    return run


def test_one_test_for_each_check(run):
    found = run(
        """
SAMPLES = [torch.randn(3, 2), (torch.randn(5),), "f64[2]"]

@pytest.mark.validate(SAMPLES, reference=F.silu, checks=CHECKS)
def test_silu(validate):
    validate(Silu.apply)
""",
        "-v",
        "-rs",
    )
    found.assert_outcomes(passed=3, skipped=1)
    found.stdout.fnmatch_lines(
        [
            "*test_silu?gradient? PASSED*",
            "*test_silu?forward_mode? SKIPPED*",
            "SKIPPED*not offered: *jvp*",
        ]
    )


def test_a_failure_says_what_and_how_to_see_it(run):
    found = run(
        """
@pytest.mark.validate([torch.randn(3, 2)], F.silu, checks=CHECKS, require=["forward_mode"])
def test_silu(validate, monkeypatch):
    monkeypatch.setattr(Silu, "wrong", lambda dy: 1.01 if dy.stride(0) == 0 else 1.0)
    validate(Silu.apply)
"""
    )
    found.assert_outcomes(passed=2, failed=2)
    found.stdout.fnmatch_lines(
        ["*wrong * strides *", "*dy = torch.empty*as_strided((3, 2), (0, 1), 0)*", "*not offered*"]
    )
    found.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_samples_may_come_from_a_function_and_have_keywords(run):
    run(
        """
def samples():
    return [Sample((torch.randn(3, 2),), {"dim": 0}), Sample((torch.randn(3),), {"dim": -1})]

@pytest.mark.validate(samples=samples, reference=torch.softmax, checks=["gradient", "gradcheck"])
def test_softmax(validate):
    validate(torch.softmax)
"""
    ).assert_outcomes(passed=2)


def test_the_fixture_alone_runs_all_checks_asked_for(run):
    found = run(
        """
def test_right(validate):
    assert validate(Silu.apply, torch.randn(3), F.silu, checks=CHECKS).ok

def test_required(validate):
    validate(Silu.apply, torch.randn(3), F.silu, checks=CHECKS, require="all")

def test_wrong(validate):
    validate(Silu.apply, torch.randn(3), torch.sin, checks=CHECKS)
"""
    )
    found.assert_outcomes(passed=1, failed=2)


def test_what_cannot_run_is_no_success(run):
    found = run(
        """
def needs_a_gpu(x):
    raise RuntimeError("no GPU")

@pytest.mark.validate([torch.randn(3)], checks=["gradcheck"])
def test_it(validate):
    validate(needs_a_gpu)
"""
    )
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*it cannot run: *no GPU*"])


@pytest.mark.parametrize(
    ("mark", "arguments", "message"),
    [
        ("[torch.randn(3)]", "", "does not take this fixture"),
        ("[torch.randn(3)], checks=['gradchek']", "validate", "no check ?'gradchek'?"),
        ("", "validate", "validate(samples"),
    ],
)
def test_bad_marks(run, mark, arguments, message):
    found = run(f"@pytest.mark.validate({mark})\ndef test_it({arguments}):\n    pass\n")
    assert found.ret != 0
    assert message.replace("?", "") in str(found.stdout).replace("[", "").replace("]", "") + str(
        found.stderr
    )


def test_with_xdist(run):
    run(
        """
@pytest.mark.validate([torch.randn(3)], F.silu, checks=["forward", "gradient"])
def test_silu(validate):
    validate(Silu.apply)
""",
        "-n1",
    ).assert_outcomes(passed=2)


def test_pytest_finds_it_where_the_package_is_installed():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert (
        """[project.entry-points.pytest11]
custom_backprop = "custom_backprop.pytest_plugin"
"""
        in project
    )
    for found in entry_points(group="pytest11", name="custom_backprop"):
        assert found.value == "custom_backprop.pytest_plugin"
