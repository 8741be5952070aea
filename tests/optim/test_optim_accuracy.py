"""How exact a step is: in float32 against float64, and in half precision against float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_helpers import FULL, every_optimizer, give_gradients, ours, parameters, stock, train

from custom_backprop.nn.utils import clip_grad_norm_

SHAPES: list[tuple[int, ...]] = [(5,), (5, 7)]  # less and more than a vector or a block


def state_of(optimizer: Any, params: list[Any]) -> list[list[torch.Tensor]]:
    return [[p.detach(), *optimizer.state[p].values()] for p in params]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("RMSprop", {"lr": 1.0, "alpha": 1 - 1e-5, "centered": True}),
        ("Adam", {"lr": 1.0, "betas": (0.9, 1 - 1e-5)}),
        ("Adam", {"lr": 1.0, "betas": (1 - 1e-5, 0.999)}),
        ("AdamW", {"lr": 1.0, "betas": (1 - 1e-5, 1 - 1e-5), "amsgrad": True}),
        ("Lion", {"lr": 1.0, "betas": (0.9, 1 - 1e-5)}),
        ("Lion", {"lr": 1.0, "betas": (1 - 1e-5, 0.99)}),
    ],
)
def test_averages_of_very_many_gradients_lose_no_digits(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """Computed in float32, 1 - β and 1 - βᵗ would be off by 3e-3 here."""
    mine, exact = parameters(device, torch.float32, SHAPES), parameters(device, shapes=SHAPES)
    for p in (*mine, *exact):
        p.detach().zero_()
    our, their = ours(name)(mine, **kwargs), stock(name)(exact, **kwargs)
    for step in range(1, 4):
        give_gradients(mine, step, skip=False)
        for p, q in zip(mine, exact, strict=True):
            q.grad = p.grad.double()  # type: ignore[union-attr]
        our.step()
        their.step()
    for tensors, others in zip(state_of(our, mine), state_of(their, exact), strict=True):
        for a, b in zip(tensors, others, strict=True):
            bound = 2e-5 * b.abs().max().item()
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_optimizer
def test_half_precision_is_computed_in_float32_and_rounded_once(
    name: str, dtype: torch.dtype, clip: float | None, backend: str, device: str
) -> None:
    """State, too. Compared with one step of torch's from the same values, to half a spacing; with
    ATen, which rounds more often, to a few."""
    half = parameters(device, dtype, SHAPES)
    our = ours(name)(half, max_grad_norm=clip, **FULL[name])
    train(our, half, 1, skip=False)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    their = stock(name)(full, **FULL[name])
    their.load_state_dict(copy.deepcopy(our.state_dict()))
    give_gradients(half, 1, skip=False)
    for p, q in zip(half, full, strict=True):
        q.grad = p.grad.float()  # type: ignore[union-attr]
    our.step()
    if clip is not None:
        clip_grad_norm_(full, clip)
    their.step()
    spacing = torch.finfo(dtype).eps
    for tensors, others in zip(state_of(our, half), state_of(their, full), strict=True):
        assert {t.dtype for t in tensors if t.dim()} == {dtype}
        for a, b in zip(tensors, others, strict=True):
            few = 2 * spacing * b.abs().max().item() if backend == "aten" else 2.0**-25
            torch.testing.assert_close(a.float(), b.float(), rtol=0.505 * spacing, atol=few)


@pytest.mark.parametrize("wide", [{}, {"master_weights": True}], ids=["half", "masters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_norm_of_half_precision_gradients_is_computed_in_float32(
    dtype: torch.dtype, wide: dict[str, bool], backend: str, device: str
) -> None:
    """In float16 it would be infinite, in bfloat16 off by 5e-4."""
    (p,) = parameters(device, dtype, [(1023,)])
    p.detach().zero_()
    p.grad = torch.full_like(p, 4096.0)
    optimizer = ours("SGD")([p], lr=1.0, max_grad_norm=1.0, **wide)
    optimizer.step()
    updated = optimizer.state[p]["master_param"] if wide else p.detach().float()
    bound = 1e-5 if wide else 0.505 * torch.finfo(dtype).eps
    torch.testing.assert_close(updated, torch.full_like(updated, -(1023**-0.5)), rtol=bound, atol=0)


@pytest.mark.parametrize(
    ("of", "its", "kwargs"),
    [
        (torch.float32, torch.bfloat16, {}),
        (torch.float32, torch.float16, {}),
        (torch.float16, torch.float32, {"master_weights": True}),
        (torch.bfloat16, torch.float32, {"master_weights": True}),
    ],
    ids=str,
)
def test_gradients_of_another_dtype_than_the_parameters(
    of: torch.dtype, its: torch.dtype, kwargs: dict[str, bool], backend: str, device: str
) -> None:
    """Narrower gradients are widened, and wider ones are not rounded first."""
    (p,), (exact,) = parameters(device, of, [(40,)]), parameters(device, torch.float32, [(40,)])
    exact.data = p.detach().float()
    our, their = ours("AdamW")([p], lr=0.1, **kwargs), stock("AdamW")([exact], lr=0.1)
    refused = backend == "aten" and its != torch.float32  # by torch's own update
    for step in range(3):
        give_gradients([exact], step, skip=False)
        exact.grad = exact.grad.to(its).float()  # type: ignore[union-attr]
        p.grad = torch.zeros_like(p)
        p.grad.data = exact.grad.to(its)
        with pytest.raises(RuntimeError, match="dtype") if refused else nullcontext():
            our.step()
        their.step()
    if refused:
        return
    updated = our.state[p]["master_param"] if kwargs else p.detach()
    torch.testing.assert_close(updated, exact.detach(), rtol=1e-5, atol=1e-6)
