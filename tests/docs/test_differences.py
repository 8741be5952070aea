"""docs/differences.md is true."""

from __future__ import annotations

import pytest
import torch
from differences import STOCK, changes, shown, table

from custom_backprop.testing import database


def test_the_table_of_inputs():
    assert shown() == table(), "python tests/docs/differences.py --write"


@pytest.mark.parametrize("name", STOCK)
def test_a_change_that_raises_no_error_changes_no_gradient(name):
    """If a saved tensor was changed, backward must raise. It is never silently wrong."""
    for sample, argument, _, ours, unchanged in changes(database()[name]):
        for a, b in zip(ours or [], unchanged or [], strict=False):
            assert (a is None) == (b is None), (sample, argument)
            if a is not None:
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), (sample, argument)
