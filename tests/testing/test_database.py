"""What the op database drives: every check, on every sample of every op, on every backend that the
machine has."""

from __future__ import annotations

import pytest
from helpers import DEVICE

from custom_backprop import functional, nn
from custom_backprop.testing import CHECKS, Make, cases, check_op, database
from custom_backprop.testing.outcome import COSTLY, ENOUGH, OF_KERNELS, SEARCHED

SPECS = list(database().values())
WITH_MODULE = [s for s in SPECS if s.module is not None]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_op(spec, backend):
    report = check_op(spec, backend, DEVICE)
    report.raise_if_failed(require="all")
    not_met = {"batch_invariance"} | OF_KERNELS | (set() if spec.elementwise else {"sweep"})
    not_met |= {check for of, check in spec.excused if of in ("", backend)}
    if not (spec.representative and backend == "aten"):
        not_met |= COSTLY
    if backend != "aten":
        not_met |= ENOUGH
    samples = cases(spec, DEVICE)[: None if backend == "aten" else 1]
    if not any(len(case.wanted) > 1 for case in samples):
        not_met.add("unwanted")
    met = {r.check for r in report.results if r.status in ("right", "not run")}
    if backend != "aten" and DEVICE == "cpu":
        not_met |= SEARCHED  # slow in the interpreter
    assert met == set(CHECKS) - not_met, "a check did not apply to any sample of our own op"
    if backend == "aten":
        assert report.status("mutations") == "right", "no sample can show a mistake"


@pytest.mark.parametrize("field", ["elementwise", "representative"])
def test_some_ops_have_what_some_tests_need(field):
    """A field that no spec sets would switch those tests off."""
    assert 5 < sum(getattr(spec, field) for spec in SPECS) < len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_spec_is_complete(spec):
    assert getattr(functional, spec.name) is spec.function
    assert ";" in spec.formula, "the formula states forward and backward"
    assert spec.function.__doc__, "a public function has a docstring"
    for size in ("awkward", "small", "medium", "large", "huge"):
        assert spec.large(Make("meta"), size).args


def test_every_public_op_has_a_spec():
    aliases = {name for name in functional.__all__ if name.endswith("_")}
    assert set(functional.__all__) - aliases == set(database())


def test_every_module_is_met_by_a_spec():
    met = {s.module[0].__name__ for s in WITH_MODULE}
    elsewhere = {
        "Softmax2d",  # test_softmax.py
        *(
            f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (2, 3)
        ),  # test_batch_norm.py
        "MultiheadAttention",  # and what it is part of: test_transformer.py
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
        "SyncBatchNorm",  # tests/distributed
    }
    assert set(nn.__all__) - met <= elsewhere
