"""What the constructors accept, and when they raise."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from optim_helpers import (
    NAMES,
    every_optimizer,
    ours,
    parameters,
    stock,
)

from custom_backprop.formulas import optim as formulas

BAD: list[tuple[str, dict[str, Any]]] = [
    *((n, {"lr": -1.0}) for n in NAMES),
    *((n, {"weight_decay": -1.0}) for n in NAMES),
    *((n, {"lr": torch.ones(2)}) for n in NAMES),
    *((n, {"unknown": 1}) for n in NAMES),
    *(
        (n, {"betas": b})
        for n in ("Adam", "AdamW", "Lion")
        for b in ((1.0, 0.9), (0.9, -0.1), (0.9, 1.1))
    ),
    *((n, {"eps": -1.0}) for n in ("Adagrad", "RMSprop", "Adam", "AdamW")),
    *((n, {"fused": True, "foreach": True}) for n in ("SGD", "Adagrad", "Adam", "AdamW")),
    ("SGD", {"momentum": -0.1}),
    ("SGD", {"nesterov": True}),
    ("Adagrad", {"lr_decay": -1.0}),
    ("RMSprop", {"alpha": -1.0}),
]


@pytest.mark.parametrize(("name", "kwargs"), BAD)
def test_bad_arguments_raise_as_torchs(name: str, kwargs: dict[str, Any]) -> None:
    errors = []
    for kind in (ours(name), stock(name)):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            kind(parameters(), **kwargs)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@every_optimizer
def test_the_ends_of_the_ranges_are_taken(name: str) -> None:
    pairs = {"betas": (0.0, 0.0)} if "betas" in inspect.signature(ours(name)).parameters else {}
    for kind in (ours(name), stock(name)):
        kind(parameters(), lr=0.0, weight_decay=0.0, **pairs)


@every_optimizer
def test_bad_parameters_raise_as_torchs(name: str) -> None:
    leaf = torch.ones(2, requires_grad=True)
    for params in (
        [],
        torch.ones(2),
        [leaf * 2],
        ["p"],
        [{"params": {leaf}}],
        [{"params": [leaf]}, {"params": [leaf]}],
    ):
        errors = []
        for kind in (ours(name), stock(name)):
            with pytest.raises((ValueError, TypeError)) as caught:
                kind(params)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@every_optimizer
def test_own_arguments(name: str) -> None:
    for kwargs in (
        {"max_grad_norm": -1.0},
        {"max_grad_norm": math.nan},
        {"master_weights": True, "bf16_stochastic_round": True},
    ):
        with pytest.raises(ValueError, match=r"max_grad_norm|choose one"):
            ours(name)(parameters(), **kwargs)
    taken = inspect.signature(ours(name)).parameters
    assert list(taken)[:-3] == list(inspect.signature(stock(name)).parameters)
    assert list(taken)[-3:] == ["max_grad_norm", "master_weights", "bf16_stochastic_round"]
    assert issubclass(ours(name), stock(name))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "Lion"])
def test_formulas_and_optimizers_have_the_same_defaults(name: str) -> None:
    constructor = inspect.signature(ours(name)).parameters
    formula = inspect.signature(getattr(formulas, name.lower())).parameters
    given = {n: p.default for n, p in formula.items() if p.kind is p.KEYWORD_ONLY}
    assert {n for n, default in given.items() if default is inspect.Parameter.empty} <= {"t", "lr"}
    for n, default in given.items():
        if n in constructor and default is not inspect.Parameter.empty:
            assert (n, default) == (n, constructor[n].default)
