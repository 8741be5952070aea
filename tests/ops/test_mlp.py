"""The gated MLPs beyond what the op database asks of every op."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from custom_backprop import functional, nn
from custom_backprop.testing import peak_memory

MODULES = (nn.SwiGLUMLP, nn.GEGLUMLP)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_saved(module, recompute, backend):
    """The input and the two products; with ``recompute`` the input. The weights are kept anyway."""
    x = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    mlp, saved = module(4, 7, recompute=recompute).to(DEVICE), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x)
    inner = [tuple(t.shape) for t in saved if not isinstance(t, torch.nn.Parameter)]
    assert inner == [(5, 4)] + ([] if recompute else [(5, 7), (5, 7)])


def loss_of_four(module, **options):
    layers = [module(64, 256, **options) for _ in range(4)]
    model, x = torch.nn.Sequential(*layers), torch.randn(256, 64)

    def step():
        model(x).sum().backward()
        model.zero_grad()

    return step


def test_peak_memory_of_four_layers():
    """65 % of what the same layers take one after another, 40 % where backward computes the
    products again; of the whole step, gradients of weights included."""

    class Stock(torch.nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            linear = torch.nn.Linear
            self.gate, self.up = linear(dim, hidden, False), linear(dim, hidden, False)
            self.down = linear(hidden, dim, False)

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    stock = peak_memory(loss_of_four(Stock))
    assert peak_memory(loss_of_four(nn.SwiGLUMLP)) < 0.65 * stock
    assert peak_memory(loss_of_four(nn.SwiGLUMLP, recompute=True)) < 0.40 * stock


def products_of_backward(recompute, frozen, x_needs):
    """How many matrix products backward makes, of 5 rows with 4 features and 7 hidden units each;
    and how many a flop counter sees."""
    mlp = nn.SwiGLUMLP(4, 7, recompute=recompute)
    for name in frozen:
        getattr(mlp, f"{name}_proj").requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=x_needs)
    loss = mlp(x).sum()
    with torch.autograd.profiler.profile() as profile:
        loss.backward()
    loss = mlp(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    made = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    return made, counter.get_total_flops() / (2 * 5 * 4 * 7)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("frozen", "x_needs", "products"),
    [
        ((), True, 6),
        (("gate",), True, 5),
        (("up",), True, 5),
        (("down",), True, 5),
        (("gate", "up", "down"), True, 3),
        ((), False, 4),
        (("gate", "down"), False, 2),
        (("gate", "up"), False, 1),
    ],
)
def test_a_frozen_layer_costs_nothing(recompute, frozen, x_needs, products):
    """No product for a gradient that nobody wants, which peers compute under LoRA."""
    products += 2 * recompute
    assert products_of_backward(recompute, frozen, x_needs) == (products, products)


@pytest.mark.parametrize("module", MODULES)
def test_layers_that_somebody_listens_to_or_has_replaced_are_called(module):
    """An adapter (LoRA) in the place of a layer is not passed over, nor is a hook."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    mlp, x, seen = module(4, 7), torch.randn(5, 4), []
    y = mlp(x)
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), y)
    assert seen == [1]
    handle.remove()
    handle = mlp.down_proj.register_full_backward_hook(lambda *_: seen.append(2))
    mlp(x).sum().backward()
    assert seen == [1, 2]
    handle.remove()
    mlp.down_proj = Adapter(mlp.down_proj)
    torch.testing.assert_close(mlp(x), y + 1)


@pytest.mark.parametrize("module", MODULES)
def test_recompute_gives_the_same_bits(module, backend):
    torch.manual_seed(0)
    mlp, x = module(4, 7, bias=True).to(DEVICE), torch.randn(5, 4, device=DEVICE)
    found = []
    for mlp.recompute in (False, True):
        found.append(torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters())))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_names_of_parameters_are_llamas():
    names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert list(nn.SwiGLUMLP(4, 7).state_dict()) == names


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.ones(2, 3)}, RuntimeError, r"\(2, 3\) and weights of shapes \(7, 4\)"),
        ({2: torch.ones(6, 4)}, RuntimeError, r"\(6, 4\) \(up\)"),
        ({3: torch.ones(4, 6)}, RuntimeError, r"\(4, 6\) \(down\)"),
        ({4: torch.ones(6)}, RuntimeError, r"bias of shape \(6,\)"),
        ({0: torch.ones(2, 4).double()}, RuntimeError, "torch.float64, torch.float32"),
        ({1: 1.0}, TypeError, "float"),
        ({3: torch.ones(4, 7, device="meta")}, RuntimeError, "one device, got cpu, cpu, cpu, meta"),
    ],
)
def test_bad_calls(change, error, message):
    shapes = ((2, 4), (7, 4), (7, 4), (4, 7), (7,), (7,), (4,))
    given = [change.get(i, torch.ones(shape)) for i, shape in enumerate(shapes)]
    with pytest.raises(error, match=message):
        functional.swiglu_mlp(*given)


def test_bad_dtypes_and_approximations():
    x, wide, down = torch.ones(2, 4), torch.ones(7, 4), torch.ones(4, 7)
    with pytest.raises(RuntimeError, match=r"geglu_mlp: approximate must be"):
        functional.geglu_mlp(x, wide, wide, down, approximate="erf")
    with pytest.raises(RuntimeError, match=r"not implemented for torch\.int64"):
        functional.swiglu_mlp(x.long(), wide.long(), wide.long(), down.long())
