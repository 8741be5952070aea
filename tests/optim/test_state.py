"""State: checkpoints, copies, and changes by the user between steps."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    assert_equal,
    every_optimizer,
    give_gradients,
    ours,
    parameters,
    stock,
    train,
)
from torch.nn import Parameter


@every_optimizer
def test_a_checkpoint_moves_both_ways(name: str, backend: str, device: str) -> None:
    kwargs, shapes = FULL[name], [(7,)]
    runs = []
    for first, second in (
        (ours(name), stock(name)),
        (stock(name), ours(name)),
        (stock(name), stock(name)),
    ):
        params = parameters(device, shapes=shapes)
        before = first(params, **kwargs)
        train(before, params, 2)
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = second(params, lr=1e9)
        after.load_state_dict(torch.load(file))
        train(after, params, range(4, 6))
        runs.append((params, after.state_dict()))
    assert_equal(runs[0], runs[2])
    assert_equal(runs[1], runs[2])


@every_optimizer
def test_two_optimizers_loaded_from_one_state_do_not_share_it(name: str) -> None:
    params = parameters()
    source = ours(name)(params, **FULL[name])
    train(source, params, 3)
    loaded = ours(name)(parameters(), **FULL[name])
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    before = copy.deepcopy(loaded.state_dict())
    train(source, params, range(3, 5))
    assert_equal(loaded.state_dict(), before)


@every_optimizer
def test_pickle_and_deepcopy(name: str) -> None:
    params = parameters()
    optimizer = ours(name)(params, max_grad_norm=0.5, **FULL[name])
    train(optimizer, params, 3)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert twin.max_grad_norm == 0.5
        assert_equal(twin.state_dict(), optimizer.state_dict())
        its = twin.param_groups[0]["params"]
        mine = [Parameter(p.detach().clone()) for p in params]
        other = ours(name)(mine, max_grad_norm=0.5, **FULL[name])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(twin, its, range(3, 6))
        train(other, mine, range(3, 6))
        assert_equal(its, mine)


def creates_missing_state(name: str) -> bool:
    """torch 2.11's Adagrad creates state only in its constructor."""
    params = parameters()
    optimizer = stock(name)(params, **FULL[name])
    optimizer.state.clear()
    try:
        train(optimizer, params, 1)
    except KeyError:
        return False
    return True


@every_optimizer
def test_removed_replaced_or_cleared_state_is_noticed(name: str) -> None:
    mine, theirs = parameters(), parameters()
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    without_state = nullcontext() if creates_missing_state(name) else pytest.raises(KeyError)
    for part in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            for step in range(3):
                give_gradients(params, 3 * part + step, skip=False)
                with without_state if part > 1 else nullcontext():
                    optimizer.step()
            if part == 0:  # one state tensor replaced
                key = next(k for k in optimizer.state[params[3]] if k != "step")
                optimizer.state[params[3]][key] = torch.full_like(params[3], 0.5)
            elif part == 1:  # all state of one parameter removed
                optimizer.state[params[4]] = {}
            else:
                optimizer.state.clear()
    assert_equal(mine, theirs)


@every_optimizer
def test_states_in_the_opposite_order_of_one_buffer(name: str) -> None:
    """As somebody may have laid them out: they are not the one tensor that they look like."""
    shapes: list[tuple[int, ...]] = [(4,)] * 3
    mine, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for optimizer, params in ((our, mine), (their, theirs)):
        train(optimizer, params, 2, skip=False)
        for key in [key for key in optimizer.state[params[0]] if key != "step"]:
            buffer = torch.empty(12, dtype=torch.float64)
            for p, place in zip(params, reversed(buffer.split(4)), strict=True):
                optimizer.state[p][key] = place.copy_(optimizer.state[p][key])
        train(optimizer, params, range(2, 5), skip=False)
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@pytest.mark.parametrize("kwargs", [{"master_weights": True}, {"bf16_stochastic_round": True}])
@every_optimizer
def test_float32_state_is_loaded_as_a_copy(name: str, kwargs: dict[str, bool]) -> None:
    """The loaded state may belong to an optimizer that continues."""
    params, others = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    source, loaded = (ours(name)(p, **kwargs, **FULL[name]) for p in (params, others))
    train(source, params, 2)
    loaded.load_state_dict(source.state_dict())
    for p, q in zip(params, others, strict=True):
        for key, value in source.state[p].items():
            assert key == "step" or loaded.state[q][key] is not value
            assert loaded.state[q][key].dtype == torch.float32
    before = copy.deepcopy(loaded.state_dict())
    train(source, params, range(2, 4))
    for p, old in before["state"].items():
        new = loaded.state_dict()["state"][p]
        assert_equal({**new, "step": 0}, {**old, "step": 0}, 0.0)  # torch shares the count


def test_a_hook_may_change_the_checkpoint_that_is_loaded() -> None:
    (p,) = parameters(dtype=torch.bfloat16, shapes=[(5,)])
    optimizer = ours("SGD")([p], master_weights=True, **FULL["SGD"])
    train(optimizer, [p], 1)

    def doubled(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = state_dict["state"][0]
        return {**state_dict, "state": {0: {key: 2 * value for key, value in state.items()}}}

    optimizer.register_load_state_dict_pre_hook(doubled)
    before = optimizer.state[p]["master_param"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[p]["master_param"], 2 * before)
