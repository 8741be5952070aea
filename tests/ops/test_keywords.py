"""Every function is called by every argument name that stock has."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop.testing import Make, database

CALLS = [
    pytest.param(spec, sample, id=f"{spec}-{i}")
    for spec in database().values()
    for i, sample in enumerate(spec.samples(Make(DEVICE, torch.float64)))
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spec", "sample"), CALLS)
def test_all_arguments_by_name(spec, sample, backend):
    """Those that the sample does not give too, at their defaults."""
    bound = inspect.signature(spec.function).bind(*sample.args, **sample.kwargs)
    told = bound.arguments.keys() | sample.kwargs.keys()
    bound.apply_defaults()
    kinds = {p.name: p.kind for p in inspect.signature(spec.function).parameters.values()}
    by_name = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            by_name.update(value)
        else:
            by_name[name] = value
    ours = spec.function(**by_name)
    torch.testing.assert_close(ours, spec.function(*sample.args, **sample.kwargs), rtol=0, atol=0)
    stock = getattr(F, spec.name, None)
    # the docstring of one that is built in tells its arguments
    theirs = names_of(stock) or getattr(stock, "__doc__", "") or by_name
    given = {k: v for k, v in by_name.items() if k in theirs}
    if stock is not None and told <= given.keys():
        torch.testing.assert_close(ours, stock(**given), rtol=1e-7, atol=1e-9)


def names_of(stock):
    """Its arguments' names, or nothing where it is built in, and a call tells."""
    try:
        return list(inspect.signature(stock).parameters)
    except (TypeError, ValueError):
        return []


@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_defaults_are_stocks(spec):
    ours = inspect.signature(spec.function).parameters
    stock = getattr(F, spec.name, None)
    for name in names_of(stock):
        assert ours[name].default == inspect.signature(stock).parameters[name].default, name


@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_names_are_stocks(spec):
    """Stock's in its order, where it tells them; ours may have more behind them."""
    theirs = names_of(getattr(F, spec.name, None))
    assert list(inspect.signature(spec.function).parameters)[: len(theirs)] == theirs
