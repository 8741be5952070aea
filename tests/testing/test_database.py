"""What the op database drives: every check, on every sample of every op, on every backend that the
machine has."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import DEVICE

from custom_backprop import functional, nn
from custom_backprop.testing import CHECKS, Make, check_op, database

SPECS = list(database().values())
WITH_MODULE = [s for s in SPECS if s.module is not None]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_op(spec, backend):
    report = check_op(spec, backend, DEVICE)
    report.raise_if_failed()
    passed = {r.check for r in report.results if r.status == "pass"}
    assert passed == set(CHECKS), "a check of our own op did not apply to any of its samples"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_spec_is_complete(spec):
    assert getattr(functional, spec.name) is spec.function
    assert ";" in spec.formula, "the formula states forward and backward"
    assert spec.function.__doc__, "a public function has a docstring"
    for size in ("small", "medium", "large", "huge"):
        assert spec.large(Make("meta"), size).args


@pytest.mark.parametrize("spec", WITH_MODULE, ids=str)
def test_module_is_a_drop_in(spec, backend):
    ours, stock, arguments, inputs = spec.module
    torch.manual_seed(7)
    mine = ours(**arguments).to(DEVICE, torch.float64)
    torch.manual_seed(7)
    theirs = stock(**arguments).to(DEVICE, torch.float64)
    assert isinstance(mine, torch.nn.Module)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    if issubclass(ours, stock):
        assert repr(mine) == repr(theirs)
        mine.load_state_dict(theirs.state_dict())
    args = inputs(Make(DEVICE, torch.float64))
    inexact = DEVICE == "cuda" and spec.name in (
        "hardsigmoid",
        "hardswish",
    )  # test_stock_multiplies_by_a_sixth_in_float32_on_a_gpu
    torch.testing.assert_close(
        mine(*args), theirs(*args), rtol=1e-7 if inexact else 1e-10, atol=1e-12
    )
    again = pickle.loads(pickle.dumps(mine))
    torch.testing.assert_close(again(*args), mine(*args), rtol=0, atol=0)


def test_every_public_op_has_a_spec():
    aliases = {name for name in functional.__all__ if name.endswith("_")}
    assert set(functional.__all__) - aliases == set(database())


def test_every_module_is_met_by_a_spec():
    met = {s.module[0].__name__ for s in WITH_MODULE}
    assert set(nn.__all__) - met <= {"Softmax2d"}
