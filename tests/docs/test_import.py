"""What ``import custom_backprop`` offers, and what it imports only on first use."""

from __future__ import annotations

import sys

import pytest
from helpers import python

import custom_backprop

LATER = ("cost", "distributed", "extend")

ASKS = """
import sys
import custom_backprop
from custom_backprop.__main__ import main
for option in ("--version", "--help"):
    try:
        main([option])
    except SystemExit as ended:
        assert ended.code == 0
import custom_backprop.pytest_plugin
for name in ("torch", "numpy", "triton"):
    assert name not in sys.modules, f"{name} is imported before anyone asked"
assert custom_backprop.nn.Linear
for name in ("custom_backprop.distributed", "torch.distributed.tensor"):
    assert name not in sys.modules, f"{name} is imported before anyone asked"
assert custom_backprop.distributed.vocab_parallel_cross_entropy
assert custom_backprop.cost.cost and custom_backprop.cost.measure
assert custom_backprop.extend.primitive
import custom_backprop.conversions.report
assert callable(custom_backprop.convert) and callable(custom_backprop.patch)
"""


def test_each_module_is_imported_on_first_use():
    """Neither the command's --help nor pytest beside an installed package waits for torch."""
    python(ASKS)


def test_a_star_import_does_not_import_them():
    python(
        "import sys; from custom_backprop import *; convert, nn, testing; "
        "assert 'torch.distributed.tensor' not in sys.modules"
    )


@pytest.mark.parametrize("name", LATER)
def test_dir_names_it(name):
    assert name in dir(custom_backprop)
    assert getattr(custom_backprop, name) is sys.modules[f"custom_backprop.{name}"]


def test_the_error_names_what_is_missing():
    with pytest.raises(AttributeError, match="'custom_backprop' has no attribute 'costs'"):
        custom_backprop.costs  # noqa: B018


def test_every_name_in_all_exists():
    assert [n for n in custom_backprop.__all__ if not hasattr(custom_backprop, n)] == []
