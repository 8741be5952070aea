"""What ``import custom_backprop`` offers, and what it leaves until it is asked for."""

from __future__ import annotations

import sys

import pytest
from helpers import python

import custom_backprop

LATER = ("cost", "distributed", "extend")

ASKS = """
import sys
import custom_backprop
for name in ("custom_backprop.distributed", "torch.distributed.tensor"):
    assert name not in sys.modules, f"{name} is imported before anyone asked"
assert custom_backprop.distributed.vocab_parallel_cross_entropy
assert custom_backprop.cost.cost and custom_backprop.cost.measure
assert custom_backprop.extend.primitive
"""


def test_each_module_is_there_when_it_is_asked_for():
    python(ASKS)


def test_a_star_import_leaves_them_alone():
    python(
        "import sys; from custom_backprop import *; convert, nn, testing; "
        "assert 'torch.distributed.tensor' not in sys.modules"
    )


@pytest.mark.parametrize("name", LATER)
def test_dir_names_it(name):
    assert name in dir(custom_backprop)
    assert getattr(custom_backprop, name) is sys.modules[f"custom_backprop.{name}"]


def test_what_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'custom_backprop' has no attribute 'costs'"):
        custom_backprop.costs  # noqa: B018


def test_all_of_all_is_there():
    assert [n for n in custom_backprop.__all__ if not hasattr(custom_backprop, n)] == []
