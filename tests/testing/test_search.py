"""The searches for sizes, strides and shared memory find faults that no other check finds, and give
a script that repeats them."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_backprop.testing import validate
from custom_backprop.testing.strategies import View, shapes, views


class Product(torch.autograd.Function):
    """y = sin(x) w, with a fault where ``fault(x, w, dy)``."""

    fault = staticmethod(lambda x, w, dy: False)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.sin() * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        off = 1.001 if ctx._forward_cls.fault(x, w, dy) else 1.0
        return dy * w * x.cos(), dy * x.sin() * off


def reference(x, w):
    return x.sin() * w


def inputs():
    torch.manual_seed(0)
    return torch.rand(3, 2) + 0.5, torch.rand(3, 2) + 0.5


def share(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def raises(x, w, dy):
    raise RuntimeError("contiguous, please")


STRIDES = {
    "grad_output expanded along one dimension": lambda x, w, dy: dy.stride(0) == 0 < dy.stride(1),
    "grad_output expanded along the other": lambda x, w, dy: dy.stride(1) == 0 < dy.stride(0),
    "grad_output with an offset": lambda x, w, dy: dy.storage_offset() == 3,
    "grad_output in windows": lambda x, w, dy: dy.stride(0) == dy.stride(1) > 0,
    "grad_output with padded rows": lambda x, w, dy: dy.stride(0) > dy.shape[1] > 1 == dy.stride(1),
    "an input with padded rows": lambda x, w, dy: w.stride(0) > w.shape[1] > 1 == w.stride(1),
    "an input with an offset": lambda x, w, dy: x.storage_offset() > 0,
    "an expanded input": lambda x, w, dy: x.stride(0) == 0 < x.stride(1),
    "an input in windows": lambda x, w, dy: x.stride(0) == x.stride(1) > 0,
    "a size of 1 with a stride of its own": lambda x, w, dy: x.shape[1] == 1 != x.stride(1),
    "one tensor twice": lambda x, w, dy: x.data_ptr() == w.data_ptr(),
    "views that overlap": lambda x, w, dy: share(x, w) and x.data_ptr() != w.data_ptr(),
    "grad_output refused": lambda x, w, dy: not dy.is_contiguous() and raises(x, w, dy),
}
SHAPES = {
    "no rows": lambda x, w, dy: x.shape[0] == 0,
    "one row": lambda x, w, dy: x.shape[0] == 1,
    "more rows": lambda x, w, dy: x.shape[0] == 4,
    "one column": lambda x, w, dy: x.shape[1] == 1,
    "three columns": lambda x, w, dy: x.shape[1] == 3,
}
FAULTS = [("strides", *fault) for fault in STRIDES.items()] + [
    ("shapes", *fault) for fault in SHAPES.items() if fault[0] != "no rows"
]


def planted(fault):
    return type("Planted", (Product,), {"fault": staticmethod(fault)})


@pytest.fixture
def module(monkeypatch):
    """One from which scripts import."""
    made = types.ModuleType("planted_functions")
    made.reference = reference
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(reference, "__module__", made.__name__)
    return made


@pytest.mark.parametrize(
    ("check", "name", "fault"), [pytest.param(*f, id="-".join(f[:2])) for f in FAULTS]
)
def test_a_fault_is_found_and_the_script_repeats_it(check, name, fault, module, capsys):
    function = module.Planted = planted(fault)
    function.__module__, function.__qualname__ = module.__name__, "Planted"
    report = validate(function.apply, inputs(), reference, checks=[check])
    assert report.status(check) == "wrong", report
    (result,) = report.failures
    script = result.script
    assert "from planted_functions import Planted" in script
    assert len([line for line in script.splitlines() if line and "import" not in line]) <= 8
    capsys.readouterr()
    if "refused" in name:
        with pytest.raises(RuntimeError, match="contiguous"):
            exec(script, {})
        return
    exec(script, {})
    ours, expected = capsys.readouterr().out.split("\n(", 1)
    assert ours.lstrip("(") != expected.rstrip()


def test_what_nobody_can_choose_must_be_taken_and_what_one_can_is_not_offered(module):
    function = planted(lambda x, w, dy: not x.is_contiguous() and raises(x, w, dy))
    report = validate(function.apply, inputs(), reference, checks=["strides"])
    assert report.status("strides") == "not offered"
    assert "contiguous, please" in report.results[0].detail
    assert ".as_strided(" in report.results[0].script


def test_a_fault_behind_a_refusal_is_found():
    def fault(x, w, dy):
        if not (x.is_contiguous() and w.is_contiguous()):
            raise RuntimeError("contiguous, please")
        return dy.stride(0) < dy.stride(1)

    report = validate(planted(fault).apply, inputs(), reference, checks=["strides"])
    assert report.status("strides") == "wrong"


def test_what_fails_in_other_sizes_is_not_offered(module):
    function = planted(lambda x, w, dy: x.shape[0] == 0 and raises(x, w, dy))
    report = validate(function.apply, inputs(), reference, checks=["shapes"])
    assert report.status("shapes") == "not offered"
    assert ".view((0, " in report.results[0].script


def test_sizes_that_belong_together_are_drawn_together():
    """Those of indices, of a tuple and of a weight with those of the input."""
    seen = set()

    def layer_norm(x, shape, w, index):
        seen.add((tuple(x.shape), index.shape, index.max().item() if index.numel() else None))
        return torch.nn.functional.layer_norm(x, shape, w)[index]

    torch.manual_seed(0)
    given = torch.randn(4, 3), (3,), torch.randn(3), torch.tensor([0, 3])
    report = validate(layer_norm, given, layer_norm, checks=["shapes"]).raise_if_failed()
    assert report.status("shapes") == "right"
    assert len(seen) > 15


def test_nothing_is_written_and_nobody_elses_random_numbers_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, before = inputs(), torch.get_rng_state()
    validate(torch.mul, given, torch.mul, checks=["strides", "shapes"]).raise_if_failed()
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_without_hypothesis_it_is_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    report = validate(torch.mul, inputs(), torch.mul, checks=["strides", "shapes"])
    assert {r.status for r in report.results} == {"not run"}
    assert "pip install" in report.results[0].detail


def test_what_differs_from_run_to_run_is_not_searched():
    report = validate(torch.nn.functional.dropout, inputs()[:1], checks=["strides"])
    assert report.status("strides") == "n/a"


def test_values_that_cannot_be_drawn_are_the_samples_own():
    """A positive definite matrix."""
    a = torch.randn(3, 3, dtype=torch.float64)
    a = a @ a.T + torch.eye(3)
    seen = set()

    def cholesky(a):
        seen.add(a.stride())
        return torch.linalg.cholesky(a)

    report = validate(cholesky, a, torch.linalg.cholesky, checks=["strides", "shapes"])
    assert report.status("strides") == "right"
    assert report.status("shapes") == "n/a"
    assert len(seen) > 3


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_view_holds_the_values(data):
    shape = data.draw(shapes())
    t = torch.arange(float(torch.Size(shape).numel())).view(shape)
    view = data.draw(views(shape))
    assert torch.equal(view.holding(t), t)
    assert View.contiguous(shape).is_contiguous
    assert View.contiguous(shape).stride == t.stride()
    over = data.draw(views(shape, overlapping=True))
    buffer = torch.zeros(over.needs)
    assert over.of(buffer).shape == t.shape  # within the buffer, or torch raises


def test_it_runs_inside_a_test_of_the_users_own_with_hypothesis():
    @settings(max_examples=2, deadline=None, database=None)
    @given(st.integers(2, 3))
    def test(n):
        x = torch.rand(n, 2)
        validate(torch.mul, (x, x), torch.mul, checks=["strides"]).raise_if_failed()

    test()
