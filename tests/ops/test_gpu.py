"""What only a GPU can show: that nothing waits for it, and that steps can be recorded in a CUDA
graph."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import custom_backprop
from custom_backprop import functional, nn, optim
from custom_backprop.testing import Make, database
from custom_backprop.testing.case import is_float, outputs, weights_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

SPECS = list(database().values())


@pytest.fixture
def waiting_is_an_error():
    """Anything that makes the host wait for the GPU raises."""

    def switch(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode(mode)

    yield lambda: switch("error")
    switch("default")


def step_of(spec, dtype=torch.float32):
    """(leaves, a call that gives their gradients)."""
    sample = spec.large(Make("cuda", dtype), "small")
    leaves = [a for a in sample.args if is_float(a) and a.requires_grad]
    dys = weights_for(outputs(spec.function(*sample.args, **sample.kwargs)))
    return leaves, lambda: torch.autograd.grad(
        outputs(spec.function(*sample.args, **sample.kwargs)), leaves, dys
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_op_waits(spec, waiting_is_an_error):
    _, step = step_of(spec)
    expected = step()
    waiting_is_an_error()
    found = step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_op_can_be_recorded(spec):
    """In a CUDA graph, replayed on other inputs: the gradients are those of an eager call, bit for
    bit."""
    leaves, step = step_of(spec)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    graph.replay()
    for ours, eager in zip(recorded, step(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.parametrize("name", optim.__all__)
def test_no_optimizer_waits(name, waiting_is_an_error):
    """With clipping and a GradScaler's factor folded in."""
    model = torch.nn.Sequential(nn.LinearActivation(8, 16), nn.Linear(16, 3)).cuda()
    optimizer = getattr(optim, name)(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    x, target = torch.randn(4, 8, device="cuda"), torch.randint(3, (4,), device="cuda")
    optimizer.grad_scale = torch.full((), 2.0, device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    step()
    step()
    before = [p.detach().clone() for p in model.parameters()]
    waiting_is_an_error()
    step()
    torch.cuda.set_sync_debug_mode("default")
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", optim.__all__)
def test_every_optimizer_can_be_recorded(name):
    """In a CUDA graph, with steps outside of it before and after, on gradients at addresses that
    the graph does not know."""
    torch.manual_seed(0)
    made = [torch.randn(n, device="cuda") for n in (3, 5000)]
    runs = [[torch.nn.Parameter(t.clone()) for t in made] for _ in range(2)]
    lists = [[torch.randn_like(t) for t in made] for _ in range(5)]
    results = []
    for params, recorded in zip(runs, (False, True), strict=True):
        optimizer = getattr(optim, name)(params, lr=1e-2)

        def step_on(grads, params=params, optimizer=optimizer):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()

        step_on(lists[0])
        step_on(lists[1])
        replay = lambda step_on=step_on: step_on(lists[0])  # noqa: E731
        if recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step_on(lists[0])
            replay = graph.replay
        for grads in lists[1:]:
            replay()
            step_on(grads)
        results.append(params)
    assert all(map(torch.equal, *results))


def test_one_launch_a_step():
    """And one to count it, where the rule asks for the number of the step."""
    params = [torch.nn.Parameter(torch.randn(3, 5, device="cuda")) for _ in range(40)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = optim.AdamW(params)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if str(e.device_type).endswith("CUDA")]
    assert len([n for n in launched if "_update" in n]) == 1, launched
    assert len(launched) <= 2, launched


@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish"])
def test_stock_multiplies_by_a_sixth_in_float32_on_a_gpu(name):
    """ATen's CUDA kernels hold 1/6 in the type that they compute float32 in, for float64 too: its
    own are not the oracle there."""
    x = torch.linspace(-2.9, 2.9, 7, dtype=torch.float64, device="cuda")
    exact = database()[name].reference(x)
    assert 1e-9 < ((getattr(F, name)(x) - exact) / exact).abs().max() < 1e-7
    for backend in ("triton", "aten", "formula"):
        with custom_backprop.use_backend(backend):
            found = [
                getattr(functional, name)(x),
                getattr(functional, name)(x.clone(), inplace=True),
            ]
            found += [
                functional.linear_activation(
                    x, torch.eye(7, dtype=x.dtype, device="cuda"), None, name
                )
            ]
            for y in found:
                torch.testing.assert_close(y, exact, rtol=1e-14, atol=0)


def test_a_negative_variance_is_nan():
    x, t = torch.randn(2, 4, device="cuda").unbind()
    v = torch.tensor([1.0, -0.5, 0.0, 2.0], device="cuda", requires_grad=True)
    loss = functional.gaussian_nll_loss(x, t, v, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert torch.autograd.grad(loss.sum(), v)[0].isnan().tolist() == [False, True, False, False]
    for backend in ("formula", "aten"):
        with custom_backprop.use_backend(backend), pytest.raises(ValueError, match="negative"):
            functional.gaussian_nll_loss(x, t, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_follows_stock(dtype):
    """Dtypes of what layers hand on, and losses, over a few steps with a GradScaler."""

    def losses(ours: bool) -> list[float]:
        torch.manual_seed(0)
        layers = (
            torch.nn.Linear(8, 32),
            torch.nn.GELU(),
            torch.nn.Linear(32, 16),
            torch.nn.Softplus(),
            torch.nn.Linear(16, 3),
        )
        model = torch.nn.Sequential(*layers).cuda()
        if ours:
            custom_backprop.convert(model)
        optimizer = (optim if ours else torch.optim).AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        cross_entropy = functional.cross_entropy if ours else F.cross_entropy
        x, target = torch.randn(64, 8, device="cuda"), torch.randint(3, (64,), device="cuda")
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                y = model(x)
                loss = cross_entropy(y, target)
            assert (y.dtype, loss.dtype) == (dtype, torch.float32)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        return found

    torch.testing.assert_close(
        torch.tensor(losses(True)), torch.tensor(losses(False)), rtol=2e-2, atol=2e-2
    )


def test_more_elements_than_int32_counts():
    """2**31 and some, in bfloat16: the last of them are read and written too."""
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB are free")
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    x[-1500:] = -2
    y = functional.relu_squared(x)
    assert y[-1501:].tolist() == [1.0] + [0.0] * 1500
    del y
    loss = functional.mse_loss(
        x, torch.zeros((), dtype=torch.bfloat16, device="cuda").expand(n), reduction="sum"
    )
    assert abs(loss.item() / (n + 3 * 1500) - 1) < 1e-2
    rows = x[: 2**31].view(2**12, 2**19)
    z = functional.softmax(rows, -1)
    assert abs(z[-1].float().sum().item() - 1) < 1e-2
