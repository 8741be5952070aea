"""Stochastic rounding to bfloat16, in the formula and in steps: unbiased, harmless, seeded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_helpers import (
    assert_equal,
    every_optimizer,
    ours,
    stock,
)
from torch import Tensor
from torch.nn import Parameter

from custom_backprop import optim
from custom_backprop.formulas import optim as formulas


@every_optimizer
def test_updates_too_small_for_bfloat16_are_not_lost(name: str, backend: str, device: str) -> None:
    """Many parameters of 1 are reduced by far less than a spacing. Rounded to nearest, none of them
    would change; on average, all do."""
    n, steps = (4096, 4) if backend != "triton" or device != "cpu" else (64, 4)
    kwargs: dict[str, Any] = (
        {"lr": 2.0**-11}
        if name != "Adagrad"
        else {"lr": 2.0**-11, "initial_accumulator_value": 1.0}
    )
    mine, exact = (
        Parameter(torch.ones(n, dtype=torch.bfloat16, device=device)),
        Parameter(torch.ones(1, device=device)),
    )
    our, their = (
        ours(name)([mine], bf16_stochastic_round=True, **kwargs),
        stock(name)([exact], **kwargs),
    )
    for _ in range(steps):
        mine.grad, exact.grad = torch.ones_like(mine), torch.ones_like(exact)
        our.step()
        their.step()
    # below 1 a spacing is 2**-8: after k roundings the mean of n is off by at most sqrt(k / (4 n))
    # spacings (one standard deviation)
    bound = 5 * 2.0**-8 * math.sqrt(steps / (4 * n))
    assert abs(mine.detach().double().mean().item() - exact.item()) < bound
    assert 1 - exact.item() > bound or backend == "triton"
    assert all(s.dtype == torch.float32 for k, s in our.state[mine].items())


SPECIAL = [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, math.nan, 2.0**-133]


def test_the_formula_does_not_change_what_bfloat16_can_represent() -> None:
    x = torch.tensor(SPECIAL)
    noise = torch.full(x.shape, 0xFFFF, dtype=torch.int32)
    assert_equal(formulas.stochastically_rounded(x, noise), x.bfloat16(), 0.0)


def test_the_formula_rounds_by_the_noise() -> None:
    """At three tenths of a spacing, seven tenths of the noise are too small to round up."""
    noise = torch.arange(65536, dtype=torch.int32)
    x = torch.full(noise.shape, 1 + 0.3 * 2.0**-7)
    rounded = formulas.stochastically_rounded(x, noise)
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    assert (rounded > 1).double().mean().item() == pytest.approx(0.3, abs=2e-5)
    assert torch.equal(formulas.stochastically_rounded(-x, noise), -rounded)


def nans_of_all_ones(n: int) -> Tensor:
    """NaNs that a carry from the lower half of their bits would turn into 0."""
    return torch.full((n,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def test_the_formula_does_not_change_nan_whatever_its_bits() -> None:
    noise = torch.full((4,), 0xFFFF, dtype=torch.int32)
    assert formulas.stochastically_rounded(nans_of_all_ones(4), noise).isnan().all()


def test_a_step_does_not_change_nan_whatever_its_bits(backend: str, device: str) -> None:
    p = Parameter(torch.ones(64, dtype=torch.bfloat16, device=device))
    p.grad = torch.zeros_like(p)
    p.grad.data = nans_of_all_ones(64).to(device)
    optim.SGD([p], lr=1.0, bf16_stochastic_round=True).step()
    assert p.isnan().all()


def rounded_step(values: Tensor, gradient: Tensor | float) -> Tensor:
    """Parameters after a step of size 1 along ``-gradient``."""
    p = Parameter(values.bfloat16())
    p.grad = torch.zeros_like(p).add_(gradient)
    optim.SGD([p], lr=1.0, bf16_stochastic_round=True).step()
    return p.detach()


def test_a_step_does_not_change_what_bfloat16_can_represent(backend: str, device: str) -> None:
    special = torch.tensor(SPECIAL * 20, device=device)
    finite = special.isfinite()
    stepped = rounded_step(special.where(finite, 1.0), -special.where(~finite, 0.0))
    assert_equal(stepped, special.bfloat16(), 0.0)
    assert torch.equal(stepped.signbit()[~special.isnan()], special.signbit()[~special.isnan()])


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_step_rounds_up_as_often_as_it_should(value: float, backend: str, device: str) -> None:
    """Each element has its own noise, whatever its block."""
    n, spacing = 1024, 2.0**-7
    step = torch.tensor(0.3 * spacing).bfloat16().item()
    stepped = rounded_step(torch.full((n,), value, device=device), -math.copysign(step, value))
    assert set(stepped.abs().tolist()) == {1.0, 1 + spacing}
    away = stepped.abs() > 1
    part = step / spacing
    assert abs(away.double().mean().item() - part) < 5 * math.sqrt(part * (1 - part) / n)
    blocks = away.view(-1, 32)  # as small as the kernel's blocks in these tests
    assert len({tuple(block.tolist()) for block in blocks}) > 0.99 * len(blocks)


def test_each_step_and_each_parameter_has_its_own_noise(backend: str, device: str) -> None:
    def fresh() -> list[Parameter]:
        made = [Parameter(torch.ones(64, dtype=torch.bfloat16, device=device)) for _ in range(2)]
        for p in made:
            p.grad = torch.full_like(p, -(2.0**-8))
        return made

    first, second = fresh(), fresh()
    optimizer = optim.SGD(first, lr=1.0, bf16_stochastic_round=True)
    optimizer.step()
    optimizer.add_param_group({"params": second})
    with torch.no_grad():
        before = [p.clone() for p in first]
        for p in first:
            p.fill_(1.0)
    optimizer.step()
    drawn = [tuple(p.tolist()) for p in (*before, *first, *second)]
    assert len(set(drawn)) == len(drawn)


def test_the_noise_depends_on_the_seed(backend: str, device: str) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        p = Parameter(torch.ones(50, dtype=torch.bfloat16, device=device))
        optimizer = optim.SGD([p], lr=2.0**-9, bf16_stochastic_round=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
