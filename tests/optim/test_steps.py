"""Steps give the results of torch.optim on every backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    NAMES,
    OPTIONS,
    SHAPES,
    assert_equal,
    every_optimizer,
    every_option,
    give_gradients,
    ours,
    parameters,
    stock,
    train,
)
from torch import Tensor
from torch.nn import Parameter

from custom_backprop import optim
from custom_backprop.nn.utils import clip_grad_norm_
from custom_backprop.optim import signature
from custom_backprop.optim.signature import guard


@every_option
def test_many_steps_are_torchs(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """A hundred steps; fewer in the interpreter, which is slow."""
    slow = backend == "triton" and device == "cpu"
    shapes, steps = ([(5,)], 12) if slow else (SHAPES, 100)
    mine, theirs = parameters(device, shapes=shapes), parameters(device, shapes=shapes)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    train(our, mine, steps)
    train(their, theirs, steps)
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@every_option
def test_awkward_shapes(name: str, kwargs: dict[str, Any], backend: str, device: str) -> None:
    mine, theirs = parameters(device), parameters(device)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    train(our, mine, range(1, 3))  # in the first step, one of them has no gradient
    train(their, theirs, range(1, 3))
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "kwargs", [k for n, k in OPTIONS if n == "SGD"], ids=lambda k: "-".join(list(k)[1:])
)
def test_sgd_gives_the_bits_of_torchs_loop(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    mine, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    train(optim.SGD(mine, fused=False, **kwargs), mine, 7)
    train(torch.optim.SGD(theirs, foreach=False, **kwargs), theirs, 7)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [None, True])
def test_sgd_in_half_precision_is_torchs_loop(fused: bool | None, dtype: torch.dtype) -> None:
    """torch's fused kernel does not change whole vectors of such parameters."""
    shapes: list[tuple[int, ...]] = [(5, 3), (1000,)]
    mine, theirs = parameters(dtype=dtype, shapes=shapes), parameters(dtype=dtype, shapes=shapes)
    train(optim.SGD(mine, fused=fused, **FULL["SGD"]), mine, 7)
    train(torch.optim.SGD(theirs, foreach=False, **FULL["SGD"]), theirs, 7)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kwargs", [k for n, k in OPTIONS if n == "SGD"], ids=lambda k: "-".join(list(k)[1:])
)
def test_sgd_gives_the_bits_of_torchs_fused_kernel(
    kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    shapes = [(5, 3), (1000,)]
    mine, theirs = parameters(dtype=dtype, shapes=shapes), parameters(dtype=dtype, shapes=shapes)
    train(optim.SGD(mine, **kwargs), mine, 7)
    train(torch.optim.SGD(theirs, fused=True, **kwargs), theirs, 7)
    assert all(map(torch.equal, mine, theirs))


@every_optimizer
def test_groups_schedulers_hooks_and_closures(name: str) -> None:
    def run(kind: Any) -> tuple[list[Parameter], list[float]]:
        params = parameters()
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05, "weight_decay": 0.01}]
        optimizer = kind(groups, **FULL[name])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [0.1, 0.2], total_steps=10, cycle_momentum=False
        )
        seen: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(-1.0))
        optimizer.register_step_post_hook(lambda *_: seen.append(-2.0))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - 0.3) ** 2).sum() for p in params)
            assert isinstance(loss, Tensor)
            loss.backward()
            return loss

        for _ in range(9):
            seen.append(float(optimizer.step(closure).detach()))
            scheduler.step()
        optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.float64))]})
        optimizer.step(closure)
        return params, seen

    mine, theirs = run(ours(name)), run(stock(name))
    assert mine[1] == pytest.approx(theirs[1], abs=1e-12)
    assert_equal(mine[0], theirs[0])


@every_optimizer
def test_a_learning_rate_may_be_a_tensor(name: str) -> None:
    mine, theirs = parameters(), parameters()
    our, their = (
        kind(params, **{**FULL[name], "lr": torch.tensor(0.01, dtype=torch.float64)})
        for kind, params in ((ours(name), mine), (stock(name), theirs))
    )
    for optimizer, params in ((our, mine), (their, theirs)):
        train(optimizer, params, 3)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        train(optimizer, params, range(3, 6))
    assert_equal(mine, theirs)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "Lion"])
def test_flags_of_torchs_variants_are_accepted(name: str, flag: str) -> None:
    if name == "RMSprop" and flag == "fused":
        with pytest.raises(TypeError):
            optim.RMSprop(parameters(), fused=True)  # type: ignore[call-arg]
        return
    kwargs = {**FULL[name], flag: True}
    mine, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    for step in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(
                params, step, skip=False
            )  # torch's fused SGD fails if a gradient is missing in the first step only
            optimizer.step()
    assert_equal(mine, theirs, 1e-6)
    assert our.state_dict()["param_groups"] == their.state_dict()["param_groups"]


@every_optimizer
def test_the_default_device_does_not_matter(name: str, backend: str, device: str) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3, 5)]
    mine, theirs = parameters(device, shapes=shapes), parameters(device, shapes=shapes)
    for params, where in ((mine, "meta"), (theirs, device)):
        optimizer = ours(name)(params, max_grad_norm=1.0, **FULL[name])
        for step in range(3):
            give_gradients(params, step)
            with torch.device(where):
                optimizer.step()
    assert_equal(mine, theirs, 0.0)


@every_optimizer
def test_a_parameter_without_a_gradient_leaves_those_behind_it_alone(name: str) -> None:
    params, (alone,) = parameters(shapes=[(5,)] * 2), parameters(shapes=[(5,)] * 2)[1:]
    before = params[0].detach().clone()
    for optimizer in (ours(name)(params, **FULL[name]), stock(name)([alone], **FULL[name])):
        give_gradients([params[1]], 0, skip=False)
        give_gradients([alone], 0, skip=False)
        optimizer.step()
    assert_equal(params[1], alone)
    assert_equal(params[0], before, 0.0)


@every_optimizer
def test_no_gradient_at_all(name: str) -> None:
    params = parameters()
    before = copy.deepcopy(params)
    ours(name)(params, max_grad_norm=1.0).step()
    assert_equal(params, before, 0.0)


@every_optimizer
def test_two_parameters_of_one_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own check never accepts them, so it is called once."""
    made: list[int] = []
    monkeypatch.setattr(signature, "guard", lambda tensors: made.append(1) or guard(tensors))
    mine, theirs = parameters(shapes=[(5,), (5,)]), parameters(shapes=[(5,), (5,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(6):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            params[1].grad = params[0].grad
            optimizer.step()
    assert_equal(mine, theirs)
    assert len(made) == 1


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        destroy_process_group()


@every_optimizer
def test_dtensor_parameters(name: str, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def run(kind: Any, **extra: Any) -> list[Tensor]:
        params = [
            Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            for p in parameters(shapes=[(6, 2), (5,)])
        ]
        optimizer = kind(params, **FULL[name], **extra)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = distribute_tensor(
                    torch.randn(p.shape, generator=generator, dtype=torch.float64), mesh, [Shard(0)]
                )
            if not extra:
                clip_grad_norm_(params, 0.5)
            optimizer.step()
        assert all(
            isinstance(s, type(params[0]))
            for p in params
            for k, s in optimizer.state[p].items()
            if k != "step"
        )
        return [p.detach().full_tensor() for p in params]

    assert_equal(run(ours(name), max_grad_norm=0.5), run(stock(name)))
