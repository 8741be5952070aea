"""What may change between two steps: parameters, gradients, hyperparameters, the backend."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    assert_equal,
    every_optimizer,
    give_gradients,
    needs_kernels,
    ours,
    parameters,
    stock,
    train,
)

import custom_backprop
from custom_backprop import optim
from custom_backprop.backends.kernels import kernels
from custom_backprop.nn.utils import clip_grad_norm_
from custom_backprop.optim import signature


@every_optimizer
def test_parameters_and_gradients_may_change_address_and_strides(name: str) -> None:
    """``p.data = ...``, gradients that are set to zero and not dropped, transposed ones (which
    torch's fused kernels misread), and a group that loses a member."""
    mine, theirs = (
        parameters(shapes=[(4, 6), (5,), (30,)]),
        parameters(shapes=[(4, 6), (5,), (30,)]),
    )
    loop = {} if name == "Lion" else {"foreach": False}
    fused = {"fused": True} if name in ("SGD", "Adagrad", "Adam", "AdamW") else {}
    our, their = ours(name)(mine, **fused, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(8):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step == 2:
                params[2].data = params[2].data.clone()
            if step in (3, 4):
                params[0].grad = params[0].grad.t().contiguous().t()
            if step == 6:
                optimizer.param_groups[0]["params"].pop()
            optimizer.step()
            if step == 0:
                optimizer.zero_grad(set_to_none=False)
    assert_equal(mine, theirs)


@every_optimizer
def test_the_stride_of_a_dimension_of_size_1_does_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = parameters(shapes=[(5, 1), (4,)]), parameters(shapes=[(5, 1), (4,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    monkeypatch.delattr(optim.optimizer, "by_torch")
    for step in range(5):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step != 2:
                params[0].grad = params[0].grad.view(1, 5).t()
                assert params[0].grad.stride() != params[0].stride()
            optimizer.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_gradients_stored_negated(name: str, backend: str, device: str) -> None:
    """As ``z.conj().imag``: the sign is a bit of the tensor."""
    mine, theirs = parameters(device, shapes=[(5,)]), parameters(device, shapes=[(5,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(5):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step > 2:
                params[0].grad = torch._neg_view(params[0].grad.neg())
            optimizer.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_a_parameter_moves_to_another_address_and_back(name: str) -> None:
    """While it is away, what depends on its address is computed, for the clipping."""
    (mine,), (theirs,) = parameters(shapes=[(5,)]), parameters(shapes=[(5,)])
    our, their = ours(name)([mine], **FULL[name]), stock(name)([theirs], **FULL[name])
    home, other = mine.data, mine.data.clone()
    for step in range(9):
        if step == 3:
            mine.data = other.copy_(home)
        elif step == 6:
            mine.data = home.copy_(other)
        our.max_grad_norm = 0.5 if step > 4 else None
        give_gradients([mine], step, skip=False)
        give_gradients([theirs], step, skip=False)
        our.step()
        if step > 4:
            clip_grad_norm_([theirs], 0.5)
        their.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_gradients_that_come_and_go(name: str) -> None:
    """Each pattern is planned once, since planning takes longer than many steps. No state moves."""
    planned: list[int] = []

    class Counted(ours(name)):  # type: ignore[misc]
        def _init_group(self, *args: Any) -> Any:
            planned.append(1)
            return super()._init_group(*args)

    mine, theirs = parameters(shapes=[(3, 2)] * 40), parameters(shapes=[(3, 2)] * 40)
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = Counted(mine, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(24):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step % 3:
                params[20 + step % 3].grad = None
            optimizer.step()
    assert_equal(mine, theirs)
    assert len(planned) == 3


@every_optimizer
def test_a_parameter_of_another_shape_at_the_same_address(name: str) -> None:
    """A transposed one is updated as by torch. If it is shorter, the old state does not fit, and
    nothing is read out of bounds."""
    mine, theirs = parameters(shapes=[(4, 4)]), parameters(shapes=[(4, 4)])
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            if step == 2:
                params[0].data = params[0].data.t()
            give_gradients(params, step, skip=False)
            params[0].grad = params[0].grad.contiguous()
            optimizer.step()
    assert_equal(mine, theirs)
    for optimizer, params in ((our, mine), (their, theirs)):
        params[0].data = params[0].data[:2]
        params[0].grad = torch.ones(2, 4, dtype=params[0].dtype)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()


def test_flags_changed_between_steps(backend: str, device: str) -> None:
    """They are constants of the compiled kernel."""
    mine, theirs = parameters(device, shapes=[(5,)]), parameters(device, shapes=[(5,)])
    our, their = (
        kind(p, lr=0.1, momentum=0.9) for kind, p in ((optim.SGD, mine), (torch.optim.SGD, theirs))
    )
    for step in range(8):
        for optimizer, params in ((our, mine), (their, theirs)):
            optimizer.param_groups[0].update(
                maximize=bool(step & 1), nesterov=bool(step & 2), weight_decay=0.1 * (step & 4)
            )
            give_gradients(params, step, skip=False)
            optimizer.step()
    assert_equal(mine, theirs)


ANOTHER: dict[str, Any] = {
    "strides": lambda p: p.data.t().contiguous().t(),
    "address": lambda p: p.data.clone(),
    "shape": lambda p: p.data.view(6, 4),
    "size": lambda p: p.data[:2].clone(),
    "storage": lambda p: p.data.view(4, 6)[:2],
    "dtype": lambda p: p.data.float(),
}


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "no guards"])
@pytest.mark.parametrize("what", ANOTHER)
@pytest.mark.parametrize("of", ["parameter", "gradient"])
@every_optimizer
def test_data_replaced_under_a_parameter_or_its_gradient(
    name: str, of: str, what: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``.data = ...`` leaves no trace except the tensor itself. Where torch fails, ours fails at
    the same step."""
    if not guarded:
        monkeypatch.setattr(signature, "guard", lambda tensors: None)
    loop = {} if name == "Lion" else {"foreach": False}
    results = []
    for kind, more in ((ours(name), {}), (stock(name), loop)):
        params = parameters(shapes=[(5,), (4, 6), (7,)])
        optimizer = kind(params, **FULL[name], **more)
        for step in range(4):
            give_gradients(params, step, skip=False)
            optimizer.step()
        for step in range(4, 8):
            give_gradients(params, step, skip=False)
            tensor = params[1] if of == "parameter" else params[1].grad
            tensor.data = ANOTHER[what](tensor)
            with suppress(RuntimeError):
                optimizer.step()
                if step < 7:
                    continue
            break
        results.append([p.detach().double() for p in params] if step == 7 else step)
    assert_equal(results[0], results[1], 1e-12 if what != "dtype" else 1e-6)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("SGD", {"momentum": 0.0}, {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
        ("Adam", {"amsgrad": True}, {"amsgrad": False}),
        ("RMSprop", {"momentum": 0.5, "centered": True}, {"momentum": 0.0, "centered": False}),
        ("AdamW", {"betas": (0.9, 0.99)}, {"betas": [0.5, 0.9]}),
        ("Lion", {"betas": (0.9, 0.99)}, {"betas": [0.5, 0.9]}),
    ],
)
def test_hyperparameters_changed_between_steps(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Those that decide which states exist, and pairs that a JSON file turned into lists."""
    mine, theirs = parameters(), parameters()
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = ours(name)(mine, lr=0.01, **before), stock(name)(theirs, lr=0.01, **loop, **before)
    for step in range(6):
        for optimizer, params in ((our, mine), (their, theirs)):
            if step == 3:
                optimizer.param_groups[0].update(after)
            give_gradients(params, step)
            optimizer.step()
    assert_equal(mine, theirs)


@needs_kernels
@every_optimizer
def test_the_backend_may_change_between_two_steps(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forced backend is the one that runs."""
    launched: list[str] = []
    launch = kernels("optim").update
    monkeypatch.setattr(
        kernels("optim"), "update", lambda *args, **kw: launched.append(now) or launch(*args, **kw)
    )
    shapes: list[tuple[int, ...]] = [(5,), (40,), (2, 3)]
    mine, theirs = parameters(device, shapes=shapes), parameters(device, shapes=shapes)
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    turns = ["formula", "triton", "triton", "formula", "triton"]
    for step, now in enumerate(turns):
        with custom_backprop.use_backend(now):
            give_gradients(mine, step, skip=False)
            our.step()
        give_gradients(theirs, step, skip=False)
        their.step()
    assert_equal(mine, theirs)
    assert launched == ["triton"] * 3


@needs_kernels
@pytest.mark.parametrize("kwargs", [{"master_weights": True}, {"bf16_stochastic_round": True}])
def test_wide_state_is_updated_by_the_backend_that_is_forced(
    kwargs: dict[str, bool], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(kernels("optim"), "update", lambda *args, **kw: launched.append(now))
    params = parameters(device, torch.bfloat16, [(5,)])
    optimizer = optim.SGD(params, **kwargs, **FULL["SGD"])
    for now in ("formula", "triton", "aten", "triton"):
        with custom_backprop.use_backend(now):
            train(optimizer, params, 1, skip=False)
    assert launched == ["triton"] * 2


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_may_be_set_between_two_steps(name: str) -> None:
    """From then on torch takes the step, and raises on a CPU."""
    params = parameters(shapes=[(3,)])
    optimizer = ours(name)(params, **FULL[name])
    train(optimizer, params, 2, skip=False)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(AssertionError, match="capturable"):
        optimizer.step()


@every_optimizer
def test_a_parameter_joins_later(name: str, backend: str, device: str) -> None:
    """Its number of steps is different, and so is where it is stored."""
    shapes: list[tuple[int, ...]] = [(3,)] * 10
    mine, theirs = parameters(device, shapes=shapes), parameters(device, shapes=shapes)
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(3):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step < 1:
                params[-1].grad = None
            optimizer.step()
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())
