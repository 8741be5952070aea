"""The bytes that an op moves in the interpreter, against the fewest possible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from custom_backprop import functional
from custom_backprop.backends import interpreting
from custom_backprop.testing import Sample, database, traffic

pytestmark = pytest.mark.skipif(not interpreting(), reason="the interpreter counts the bytes")

NUMBERS = 131 * 257
T = 4 * NUMBERS


def of(name, size="awkward", **changes):
    forward, backward = traffic(replace(database()[name], **changes), size)
    return forward, backward


def test_elementwise():
    forward, backward = of("relu")
    assert (forward.moved, forward.floor) == (2 * T, 2 * T)
    assert (backward.moved, backward.floor) == (3 * T, 3 * T)
    assert not forward.faults
    assert not backward.faults


def test_a_loss_makes_its_gradient_in_forward():
    forward, backward = of("mse_loss")
    assert forward.floor == 3 * T + 4
    assert backward.moved == backward.floor == 4


def test_a_small_tensor_is_read_once():
    forward, backward = of("layer_norm", "medium")
    t, statistics, weight = 4 * 256 * 256, 2 * 4 * 256, 4 * 256
    assert forward.moved == forward.floor == 2 * t + statistics + 2 * weight
    assert backward.floor == 3 * t + statistics + 3 * weight


def test_a_large_tensor_counts_each_time_it_is_read():
    def twice(x):
        return functional.relu(functional.relu(x))

    forward, backward = of("relu", function=twice)
    assert forward.moved == 4 * T
    assert forward.faults == ["moved 1.33 times as many bytes as it must; 1.05 are allowed"]
    assert backward.faults


def test_a_product_is_not_memory_bound():
    forward, _ = of("linear", "medium")
    assert forward.ratio > 1.05
    assert not forward.is_memory_bound
    assert not forward.faults


def test_an_op_without_a_kernel_has_no_traffic():
    def large(make, size):
        return Sample((make.tensor(0, 3),))

    assert traffic(replace(database()["relu"], large=large)) == []
