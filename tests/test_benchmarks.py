"""The benchmarks run: they are not part of the suite, so one of each kind is."""

from __future__ import annotations

import pytest

from custom_backprop.testing import database

benchmarks = pytest.importorskip("benchmarks.test_ops")


@pytest.mark.parametrize("direction", benchmarks.DIRECTIONS)
@pytest.mark.parametrize("which", ["ours", "stock"])
def test_an_op_is_timed(benchmark, direction, which):
    benchmarks.test_op(benchmark, database()["relu6"], "small", direction, which)
