"""torch.compile with Inductor, whole graphs, on a few ops and a network: the generated code calls
our operators between its own."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.testing import peak_memory

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU"
)


def both(function, *inputs):
    """Outputs and gradients, eager and compiled, under one random weight."""
    torch._dynamo.reset()
    found = []
    for f in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        torch.manual_seed(3)
        found.append((y.detach(), torch.autograd.grad(y, leaves, torch.randn_like(y))))
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.gelu(2 * x) + 1,
        lambda x: functional.softmax(functional.relu(x), dim=0),
        lambda x: functional.cross_entropy(x * 2, torch.tensor([1, 0, 2], device=DEVICE)),
    ],
    ids=["gelu", "relu and softmax", "cross_entropy"],
)
def test_ops(function):
    eager, compiled = both(function, torch.randn(3, 5, device=DEVICE, dtype=torch.float64))
    torch.testing.assert_close(compiled, eager)


def test_a_network_trains_compiled_as_it_does_eager():
    torch.manual_seed(0)
    x, target = torch.randn(16, 6, device=DEVICE), torch.randint(0, 3, (16,), device=DEVICE)
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            nn.LinearActivation(6, 8, activation="silu"), nn.Linear(8, 3)
        ).to(DEVICE)
        step = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses[compiled] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(step(x), target)
            loss.backward()
            optimizer.step()
            losses[compiled].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]


def test_the_backend_is_chosen_when_the_graph_runs():
    compiled = torch.compile(functional.silu, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, dtype=torch.float64)
    expected = torch.nn.functional.silu(x)
    for backend in ("aten", "formula"):
        with custom_backprop.use_backend(backend):
            torch.testing.assert_close(compiled(x), expected)


def test_compiled_cross_entropy_needs_no_second_gradient():
    """Of the logits' size, the compiled step allocates dx and nothing else, as the eager one."""
    x = torch.randn(64, 8192, device=DEVICE, requires_grad=True)
    target = torch.randint(8192, (64,), device=DEVICE)
    torch._dynamo.reset()
    for function in (functional.cross_entropy, torch.compile(functional.cross_entropy)):

        def step(function=function):
            return torch.autograd.grad(function(x, target), x)

        step()
        assert peak_memory(step, DEVICE) < 1.3 * x.nbytes


def test_compiled_linear_cross_entropy_has_never_all_logits():
    x = torch.randn(256, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(8192, 16, device=DEVICE, requires_grad=True)
    target = torch.randint(8192, (256,), device=DEVICE)
    torch._dynamo.reset()
    eager = functional.linear_cross_entropy
    compiled = torch.compile(eager, fullgraph=True)
    found = []
    for function in (eager, compiled):

        def step(function=function):
            loss = function(x, weight, target, softcap=5.0, chunk_size=32)
            return loss, *torch.autograd.grad(2 * loss, (x, weight))

        found.append(step())
        assert peak_memory(step, DEVICE) < 256 * 8192 * 4 / 2
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["info_nce", "linear", "mse_loss"])
def test_compiled_under_autocast_as_eager(name):
    """What is computed in float32 is not cast again inside the formula."""
    function = getattr(functional, name)
    x, t = torch.randn(2, 6, 8, device=DEVICE).unbind()
    torch._dynamo.reset()
    found = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = f(leaf, t)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), leaf)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
