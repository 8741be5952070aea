"""Clipping: of gradients, inside a step or before it by torch's own functions, and of weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    OPTIONS,
    assert_clip_alike,
    assert_equal,
    every_optimizer,
    give_gradients,
    ours,
    parameters,
    stock,
)
from torch.nn import Parameter

from custom_backprop.nn import utils
from custom_backprop.nn.utils import clip_grad_norm_


def test_gradient_functions_are_torchs_own() -> None:
    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"):
        assert getattr(utils, name) is getattr(torch.nn.utils, name)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [0.5, 1, 2.0, 3, math.inf])
def test_clip_grad_norm(norm_type: float, foreach: bool | None) -> None:
    params = [Parameter(torch.zeros(s, dtype=torch.float64)) for s in ((3, 2), (5,), ())]
    for p in params[:2]:
        p.grad = torch.randn_like(p)
    all_of_them = torch.cat([p.grad.flatten() for p in params[:2] if p.grad is not None])
    total = torch.linalg.vector_norm(all_of_them, norm_type)
    assert torch.allclose(
        utils.get_total_norm(
            [p.grad for p in params[:2] if p.grad is not None], norm_type, foreach=foreach
        ),
        total,
    )
    assert torch.allclose(utils.clip_grad_norm_(params, 0.5, norm_type, foreach=foreach), total)
    clipped = torch.cat([p.grad.flatten() for p in params[:2] if p.grad is not None])
    assert torch.allclose(clipped, all_of_them * min(1.0, float(0.5 / (total + 1e-6))))


def test_clip_grad_norm_of_a_non_finite_gradient() -> None:
    p = Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, math.inf])
    with pytest.raises(RuntimeError, match="non-finite"):
        utils.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad.tolist() == [1.0, math.inf]


def test_clip_weights() -> None:
    params = [
        Parameter(torch.tensor([3.0, -2.0, math.nan, 0.5, math.inf])),
        Parameter(torch.tensor([[0.1, -7.0]], dtype=torch.bfloat16)),
        torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3).t(),
        torch.empty(0),
    ]
    versions = [p._version for p in params]
    assert utils.clip_weights_((p for p in params), 1) is None
    assert torch.equal(params[0].nan_to_num(9), torch.tensor([1.0, -1.0, 9.0, 0.5, 1.0]))
    assert params[1].tolist() == [[torch.tensor(0.1).bfloat16().item(), -1.0]]
    assert torch.equal(
        params[2], torch.linspace(-2, 2, 6, dtype=torch.float64).clamp(-1, 1).view(2, 3).t()
    )
    assert all(p._version > v for p, v in zip(params[:3], versions, strict=False))
    assert params[0].requires_grad
    assert params[0].grad_fn is None


def test_clip_weights_of_one_tensor_or_none() -> None:
    weight = torch.tensor([2.0, -0.5])
    utils.clip_weights_(weight, 0.0)
    assert weight.tolist() == [0.0, 0.0]
    utils.clip_weights_([], 1.0)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_clip_weights_raises_on_an_empty_range(value: float) -> None:
    weight = torch.ones(2)
    with pytest.raises(ValueError, match="clip_value"):
        utils.clip_weights_(weight, value)
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("norm", [0.0, 0.7, 1e6])
@every_optimizer
def test_max_grad_norm_is_clip_grad_norm_before_the_step(
    name: str, norm: float, backend: str, device: str
) -> None:
    mine, theirs = (
        parameters(device, shapes=[(5,), (2, 3)]),
        parameters(device, shapes=[(5,), (2, 3)]),
    )
    our, their = (
        ours(name)(mine, max_grad_norm=norm, **FULL[name]),
        stock(name)(theirs, **FULL[name]),
    )
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        before = copy.deepcopy([p.grad for p in mine])
        our.step()
        for p, g in zip(mine, before, strict=True):
            assert p.grad is g is None or torch.equal(p.grad, g)
        clip_grad_norm_(theirs, norm)
        their.step()
    assert_equal(mine, theirs)


@pytest.mark.parametrize(
    "kwargs", [k for n, k in OPTIONS if n == "SGD"], ids=lambda k: "-".join(list(k)[1:])
)
def test_max_grad_norm_where_torchs_loop_is_asked_for(kwargs: dict[str, Any]) -> None:
    mine, theirs = parameters(shapes=[(5,), (2, 3)]), parameters(shapes=[(5,), (2, 3)])
    our = ours("SGD")(mine, max_grad_norm=0.5, fused=False, **kwargs)
    their = stock("SGD")(theirs, foreach=False, **kwargs)
    assert_clip_alike(our, their, mine, theirs)
