"""Steps under a GradScaler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from optim_helpers import (
    DEVICE,
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


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, *([] if DEVICE == "cuda" else [torch.bfloat16])],
    ids=str,
)
@every_optimizer
def test_grad_scaler_and_an_infinity(
    name: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A step on scaled gradients equals one on the gradients. A step with an infinity does not
    change parameters or states."""
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))
    mine, theirs = parameters(device, dtype, [(5,)]), parameters(device, dtype, [(5,)])
    our, their = ours(name)(mine, **FULL[name]), ours(name)(theirs, **FULL[name])
    for step in range(4):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        if step == 2:
            mine[0].grad[1] = math.inf  # type: ignore[index]
            before = copy.deepcopy((mine, our.state_dict()["state"]))
        for p in mine:
            p.grad = p.grad * scaler.get_scale()
        scaler.step(our)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 512.0
            assert_equal((mine, our.state_dict()["state"]), before, 0.0)
        else:
            their.step()
    assert not hasattr(our, "grad_scale")
    assert_equal(mine, theirs, 0.0 if dtype != torch.float32 else 1e-6)


@every_optimizer
def test_a_scale_below_1(name: str, backend: str, device: str) -> None:
    """Where it has come to after infinities: gradients are made larger."""
    mine, theirs = (
        parameters(device, shapes=[(5,), (2, 3)]),
        parameters(device, shapes=[(5,), (2, 3)]),
    )
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    our.grad_scale = torch.tensor(0.5, device=device)
    for step in range(2):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        for p in mine:
            p.grad = p.grad * 0.5
        our.step()
        their.step()
    assert_equal(mine, theirs)


@pytest.mark.parametrize("backend", ["formula", "aten"])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW", "Lion"])
def test_an_infinity_at_the_first_step_begins_no_state(name: str, backend: str) -> None:
    params = parameters()
    optimizer = ours(name)(params, **FULL[name])
    give_gradients(params, 0)
    optimizer.found_inf = torch.ones(())
    with custom_backprop.use_backend(backend):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.skipif(DEVICE != "cuda", reason="asks a GPU")
def test_on_a_gpu_torch_scales_no_bfloat16_gradients() -> None:
    """pytorch issue 127176. Once it does, the test above can include them on a GPU, too."""
    with pytest.raises(NotImplementedError, match="BFloat16"):
        torch._amp_foreach_non_finite_check_and_unscale_(
            [torch.ones(1, dtype=torch.bfloat16, device=DEVICE)],
            torch.zeros(1, device=DEVICE),
            torch.ones(1, device=DEVICE),
        )


@every_optimizer
def test_a_bucket_on_a_cpu_reads_the_infinity_that_a_gpu_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels read it themselves, but parameters may be on both devices."""
    monkeypatch.setattr(optim.optimizer.MultiTensor, "_reads", lambda self, found: False)
    params = parameters()
    optimizer = ours(name)(params, **FULL[name])
    give_gradients(params, 1)
    optimizer.found_inf = torch.ones(())
    before = copy.deepcopy(params)
    optimizer.step()
    assert_equal(params, before, 0.0)
    del optimizer.found_inf
    theirs = parameters()
    give_gradients(theirs, 1)
    optimizer.step()
    stock(name)(theirs, **FULL[name]).step()
    assert_equal(params, theirs)


@every_optimizer
def test_grad_scaler_after_unscale(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    mine, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    our, their = (
        ours(name)(mine, max_grad_norm=0.1, **FULL[name]),
        ours(name)(theirs, max_grad_norm=0.1, **FULL[name]),
    )
    for step in range(3):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        for p in mine:
            p.grad = p.grad * 8
        if step != 1:
            scaler.unscale_(our)
        scaler.step(our)
        scaler.update()
        their.step()
    assert_equal(mine, theirs, 1e-6)


@pytest.mark.parametrize("backend", ["formula", pytest.param("triton", marks=needs_kernels)])
@every_optimizer
def test_an_infinity_skips_what_torch_updates_too(name: str, backend: str, device: str) -> None:
    """Next to a bucket, whichever of them reads the infinity."""
    params = parameters(device, shapes=[(4, 6), (5,)])
    optimizer = ours(name)(params, **FULL[name])
    with custom_backprop.use_backend(backend):
        train(optimizer, params, 1, skip=False)
        give_gradients(params, 1, skip=False)
        params[0].grad = params[0].grad.t().contiguous().t()  # type: ignore[union-attr]
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
        assert_equal((params, optimizer.state_dict()["state"]), before, 0.0)
        del optimizer.found_inf
        optimizer.step()
        assert not any(map(torch.equal, params, before[0]))
