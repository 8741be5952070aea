"""Cases in which torch's own update runs: sparse, complex, capturable, differentiable, compiled."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    assert_clip_alike,
    assert_equal,
    every_optimizer,
    give_gradients,
    ours,
    parameters,
    stock,
)
from torch import Tensor
from torch.nn import Parameter

from custom_backprop import optim
from custom_backprop.nn.utils import clip_grad_norm_


@every_optimizer
def test_the_default_device_does_not_matter_where_torch_updates(name: str) -> None:
    """As it does for a gradient with other strides."""
    mine, theirs = parameters(shapes=[(4, 6)]), parameters(shapes=[(4, 6)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(3):
        for optimizer, params, where in ((our, mine, "meta"), (their, theirs, "cpu")):
            give_gradients(params, step, skip=False)
            params[0].grad = params[0].grad.t().contiguous().t()
            with torch.device(where):
                optimizer.step()
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name: str) -> None:
    def run(kind: Any, **extra: Any) -> list[Parameter]:
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(9, 4, sparse=True, dtype=torch.float64)
        dense = Parameter(torch.ones(4, dtype=torch.float64))
        params = [embedding.weight, dense]
        optimizer = kind(params, lr=0.1, **extra)
        for step in range(5):
            optimizer.zero_grad()
            ((embedding(torch.tensor([step, 3, 3])) * dense) ** 2).sum().backward()
            if not extra and kind is stock(name) and clip:
                total = torch.linalg.vector_norm(
                    torch.cat([embedding.weight.grad.coalesce().values().flatten(), dense.grad])
                )
                for p in params:
                    p.grad = p.grad * min(1.0, float(clip / (total + 1e-6)))
            optimizer.step()
        return params

    clip = 0.0
    assert_equal(run(ours(name)), run(stock(name)))
    clip = 0.5
    assert_equal(run(ours(name), max_grad_norm=clip), run(stock(name)))


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW", "Lion"])
def test_sparse_gradients_raise_where_torch_raises(name: str) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours(name)([p]).step()


@every_optimizer
def test_complex_and_real_parameters_together(name: str) -> None:
    def run(kind: Any, **extra: Any) -> list[Parameter]:
        generator = torch.Generator().manual_seed(3)
        params = [
            Parameter(torch.randn(4, dtype=d, generator=generator))
            for d in (torch.complex128, torch.float64, torch.complex128)
        ]
        optimizer = kind(params, **FULL[name], **extra)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(4, dtype=p.dtype, generator=generator)
            if clip:
                clip_grad_norm_(params, clip)
            optimizer.step()
        return params

    clip = 0.0
    assert_equal(run(ours(name)), run(stock(name)))
    clip = 0.4
    reference = run(stock(name))
    clip = 0.0
    assert_equal(run(ours(name), max_grad_norm=0.4), reference)


@every_optimizer
def test_differentiable(name: str) -> None:
    """Autograd differentiates the step with respect to what the gradient was computed from."""

    def run(kind: Any) -> Tensor:
        start = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.01, weight_decay=0.1, differentiable=True)
        p.grad = (start * 3).detach() if name == "Adagrad" else start * 3
        optimizer.step()
        (p * p).sum().backward()
        assert start.grad is not None
        return start.grad

    assert_equal(run(ours(name)), run(stock(name)))
    with pytest.raises(ValueError, match="differentiable"):
        ours(name)(parameters(), differentiable=True, max_grad_norm=1.0)


CAPTURABLE = pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])


def pretend_that_torch_captures_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in map(importlib.import_module, ("torch.optim.adam", "torch.optim.rmsprop")):
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_: [device])


@CAPTURABLE
def test_capturable_is_torchs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch raises when it steps. Where it does not, ours adds clipping."""
    for kind in (ours(name), stock(name)):
        params = parameters(shapes=[(3,)])
        optimizer = kind(params, capturable=True)
        give_gradients(params, 0)
        with pytest.raises(AssertionError, match="capturable"):
            optimizer.step()
    pretend_that_torch_captures_on("cpu", monkeypatch)
    mine, theirs = parameters(shapes=[(3,), (7,)]), parameters(shapes=[(3,), (7,)])
    kwargs = {**FULL[name], "capturable": True}
    our, their = ours(name)(mine, max_grad_norm=0.5, **kwargs), stock(name)(theirs, **kwargs)
    assert_clip_alike(our, their, mine, theirs)


@CAPTURABLE
def test_a_capturable_step_reads_nothing_from_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the factor of clipping. On the meta device nothing can be read."""
    pretend_that_torch_captures_on("meta", monkeypatch)
    p = Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    optimizer = ours(name)([p], capturable=True, max_grad_norm=0.5)
    optimizer.step()
    assert optimizer.state[p]["step"].is_meta


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_gradients_that_come_and_go_where_torch_updates(name: str, fused: bool | None) -> None:
    """The one that stays is of other strides than its parameter."""
    shapes: list[tuple[int, ...]] = [(4, 6), (4, 6)]
    mine, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    our = ours(name)(mine, max_grad_norm=0.5, fused=fused, **FULL[name])
    their = stock(name)(theirs, foreach=False, **FULL[name])
    for step in range(6):
        for params in (mine, theirs):
            give_gradients(params, step, skip=False)
            for p in params:
                p.grad = p.grad.t().contiguous().t()  # type: ignore[union-attr]
            if step in (2, 3):
                params[0].grad = None
        our.step()
        clip_grad_norm_(theirs, 0.5)
        their.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_what_torch_updates_is_planned_once(name: str) -> None:
    planned: list[int] = []

    class Counted(ours(name)):  # type: ignore[misc]
        def _init_group(self, group: Any, *lists: Any) -> Any:
            planned.append(len(group["params"]))
            return super()._init_group(group, *lists)

    params = [Parameter(torch.ones(3, dtype=torch.complex128)), *parameters(shapes=[(5,)])]
    optimizer = Counted(params, **FULL[name])
    for _ in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert planned.count(2) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_and_groups_are_restored_after_torchs_step(fails: bool) -> None:
    """They are clipped and unscaled only for the step: ``.grad`` and a GradScaler's attributes are
    unchanged after it, even if torch raises."""
    params = parameters(shapes=[(3, 4), (5,)])
    optimizer = optim.Adam(params, max_grad_norm=0.5, fused=True)
    give_gradients(params, 0, skip=False)
    params[0].grad = params[0].grad.t().contiguous().t()  # type: ignore[union-attr]
    if fails:
        optimizer.param_groups[0]["capturable"] = True
    grads, groups = [p.grad for p in params], optimizer.param_groups
    values = [g.clone() for g in grads if g is not None]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(AssertionError, match="capturable") if fails else nullcontext():
        optimizer.step()
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0]["params"] == params
    assert optimizer.param_groups[0]["fused"] is True
    assert (optimizer.grad_scale.item(), optimizer.found_inf.item()) == (2.0, 0.0)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))


def test_a_sparse_gradient_is_unchanged_after_clipping() -> None:
    embedding = torch.nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 3, 3])).square().sum().backward()
    given = embedding.weight.grad
    assert given is not None
    before = given.to_dense()
    optim.SGD([embedding.weight], lr=0.1, max_grad_norm=1e-3).step()
    assert embedding.weight.grad is given
    assert torch.equal(given.to_dense(), before)


@every_optimizer
def test_compiled(name: str) -> None:
    mine, theirs = parameters(shapes=[(5,), (2, 3)]), parameters(shapes=[(5,), (2, 3)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for optimizer, params in ((our, mine), (their, theirs)):
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager")
        for i in range(3):
            give_gradients(params, i, skip=False)
            step()
    assert_equal(mine, theirs)


def test_compiled_with_an_argument_of_ours() -> None:
    mine, theirs = parameters(shapes=[(5,)]), parameters(shapes=[(5,)])
    our, their = (
        optim.SGD(mine, lr=0.1, max_grad_norm=0.5),
        optim.SGD(theirs, lr=0.1, max_grad_norm=0.5),
    )
    torch._dynamo.reset()
    step = torch.compile(our.step, backend="aot_eager")
    for i in range(2):
        give_gradients(mine, i)
        give_gradients(theirs, i)
        step()
        their.step()
    assert_equal(mine, theirs)
