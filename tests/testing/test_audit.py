"""The audit of an op compares its results with the formula's. (What one launch may touch:
tests/kernels/test_kernels.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest

from custom_backprop.backends import get_backend, interpreting
from custom_backprop.testing import Make, database
from custom_backprop.testing.audit import audit_op

pytestmark = pytest.mark.skipif(not interpreting(), reason="the audit watches the interpreter")


@pytest.mark.parametrize("size", ["medium", "awkward"])
def test_a_sum_that_counts_a_row_twice_is_a_fault(size):
    """Whatever it reads, it may read."""
    spec = database()["mse_loss"]
    met = spec.large(Make("meta"), size).args[0].shape

    def counts_twice(input, target, **options):
        loss = spec.function(input, target, **options)
        if get_backend() == "triton" and input.shape == met:
            loss = loss + (input[-1] - target[-1]).square().sum() / input.numel()
        return loss

    found = audit_op(replace(spec, function=counts_twice, samples=lambda make: ()))
    assert found.faults == found.differences
    assert len(found.faults) == 2, "the loss and its gradient"
    with pytest.raises(AssertionError, match="off the formula's"):
        found.raise_if_faulty()


def test_a_right_op_has_no_fault():
    audit_op(replace(database()["mse_loss"], samples=lambda make: ())).raise_if_faulty()
