"""Half-precision parameters that are updated in float32, with or without a float32 copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_helpers import (
    FULL,
    NAMES,
    assert_equal,
    every_optimizer,
    give_gradients,
    ours,
    parameters,
    stock,
    train,
)
from torch import Tensor
from torch.nn import Parameter

import custom_backprop
from custom_backprop import optim
from custom_backprop.nn.utils import clip_weights_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_optimizer
def test_master_weights(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Half-precision parameters follow a float32 run on the same gradients, also after a
    checkpoint."""
    shapes = [(5,), (2, 3)]
    half, full = (
        parameters(device, dtype, shapes),
        [Parameter(p.detach().float()) for p in parameters(device, dtype, shapes)],
    )
    our, their = (
        ours(name)(half, master_weights=True, **FULL[name]),
        stock(name)(full, **FULL[name]),
    )
    for step in range(4):
        give_gradients(half, step)
        for p, q in zip(half, full, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        our.step()
        their.step()
        for p, q in zip(half, full, strict=True):
            assert_equal(our.state[p]["master_param"], q.detach(), 1e-5)
            assert torch.equal(p, our.state[p]["master_param"].to(dtype))
        if step == 1:
            saved = copy.deepcopy(our.state_dict())
            our = ours(name)(half, master_weights=True, **FULL[name])
            our.load_state_dict(saved)
            assert_equal(our.state_dict(), saved, 0.0)


def test_masters_follow_changes_to_the_parameters(backend: str, device: str) -> None:
    """After weight clipping, or after a model is loaded again, the next step starts from there."""
    (p,) = parameters(device, torch.bfloat16, [(5,)])
    optimizer = ours("SGD")([p], lr=1.0, master_weights=True)
    for _ in range(4):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        clip_weights_(p, 0.5)
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[p]["master_param"], torch.full((5,), 1.5, device=device)
    )
    with torch.no_grad():
        p[2] = 8.0
    p.data = p.data.clone()
    optimizer.step()
    expected = torch.full((5,), 2.5, device=device)
    expected[2] = 9.0
    torch.testing.assert_close(optimizer.state[p]["master_param"], expected)
    torch.testing.assert_close(p.detach(), expected.bfloat16())


WIDE: list[dict[str, Any]] = [{"master_weights": True}, {"bf16_stochastic_round": True}]


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@every_optimizer
def test_gradients_and_states_in_another_order_of_memory(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """A transposed gradient, or a checkpoint of a model in another memory format: only the index of
    an element counts."""

    def run(transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        (p,) = parameters(device, torch.bfloat16, [(4, 6)])
        optimizer = ours(name)([p], **kwargs, **FULL[name])
        for step in range(6):
            give_gradients([p], step, skip=False)
            if transposed and step != 4:
                p.grad = p.grad.t().contiguous().t()
            optimizer.step()
            if transposed and step == 2:
                for key, state in optimizer.state[p].items():
                    optimizer.state[p][key] = (
                        state.t().contiguous().t() if state.dim() == 2 else state
                    )
        return p.detach(), optimizer.state[p]

    (mine, states), (theirs, others) = run(True), run(False)
    assert_equal(states, others, 1e-6 if "master_weights" in kwargs else 1e-2)
    assert_equal(mine, theirs, 1e-6 if "master_weights" in kwargs else 1e-2)
    assert {s.dtype for s in states.values()} == {torch.float32}


class _Kind(Parameter):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "capturable": (lambda p: p, "capturable"),
    "sparse": (lambda p: p, "dense"),
    "subclass": (lambda p: _Kind(p.detach()), "_Kind"),
    "gaps": (lambda p: Parameter(torch.zeros(6, 8, dtype=p.dtype)[:, ::2]), "gaps in memory"),
    "shape": (lambda p: p, "shape"),
}


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@pytest.mark.parametrize(
    ("name", "what"),
    [
        (n, w)
        for n in NAMES
        for w in REFUSED
        if w != "capturable" or n in ("RMSprop", "Adam", "AdamW")
    ],
)
def test_options_that_torchs_own_update_would_ignore_raise(
    name: str, what: str, kwargs: dict[str, Any]
) -> None:
    (p,), (make, match) = parameters(dtype=torch.bfloat16, shapes=[(6, 4)]), REFUSED[what]
    p = make(p)
    optimizer = ours(name)(
        [p], **kwargs, **FULL[name], **({"capturable": True} if what == "capturable" else {})
    )
    p.grad = torch.ones_like(p)
    if what == "sparse":
        p.grad = p.grad.to_sparse()
        if name not in ("SGD", "Adagrad"):
            match = "does not support sparse gradients"  # torch's own
    elif what == "shape":
        p.grad.data = torch.ones(4, 6, dtype=p.dtype)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=match) as refused:
        optimizer.step()
    assert torch.equal(p, before)
    if "support" not in match:
        assert str(refused.value).startswith(f"{next(iter(kwargs))}=True cannot be combined with ")
    full = Parameter(p.detach().float())  # a float32 parameter needs no master copy
    full.grad = torch.ones_like(full)
    if what != "capturable":
        ours(name)([full], **kwargs, **FULL[name]).step()


@every_optimizer
def test_a_master_of_another_shape_is_refused(name: str) -> None:
    (p,) = parameters(dtype=torch.bfloat16, shapes=[(6, 4)])
    optimizer = ours(name)([p], master_weights=True, **FULL[name])
    train(optimizer, [p], 1, skip=False)
    optimizer.state[p]["master_param"] = torch.zeros(4, 6)
    give_gradients([p], 1, skip=False)
    with pytest.raises(RuntimeError, match="another shape"):
        optimizer.step()


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@every_optimizer
def test_hyperparameters_from_a_graph(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """Their values are read, on any device."""

    def run(lr: Any) -> Tensor:
        torch.manual_seed(0)
        (p,) = parameters(device, torch.bfloat16, [(5,)])
        optimizer = ours(name)([p], **{**FULL[name], "lr": lr}, **kwargs)
        train(optimizer, [p], 3)
        assert all(s.dtype == torch.float32 for s in optimizer.state[p].values())
        return p.detach()

    assert_equal(run(torch.tensor(0.25, device=device, requires_grad=True)), run(0.25), 0.0)


def test_where_aten_has_no_update_of_ours_the_formula_updates_masters() -> None:
    """On a device other than a CPU; here, on a device without data."""
    p = Parameter(torch.empty(3, dtype=torch.bfloat16, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, master_weights=True)
    with custom_backprop.use_backend("aten"):
        optimizer.step()
    assert {name: s.dtype for name, s in optimizer.state[p].items()} == dict.fromkeys(
        ("momentum_buffer", "master_param"), torch.float32
    )
