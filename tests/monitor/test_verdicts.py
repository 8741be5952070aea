"""Planted faults are reported with their layer. Healthy networks get no verdict."""

from __future__ import annotations

import math

import pytest
import torch
from monitor_helpers import batch, kinds, network, train, watched
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from custom_backprop.init import init_for
from custom_backprop.monitor import (
    CURES,
    GradientMonitor,
    Layer,
    Reading,
    judge,
)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_vanishing(activation):
    model = network(activation, depth=12)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    verdict = watched(model).verdicts[0]
    assert (verdict.kind, verdict.layer) == ("vanishing", "0")
    assert "init_for" in verdict.cure
    assert "normalise" in str(verdict)


def test_vanishing_without_biases_shows_in_the_activations():
    """There the gradients of all layers have equally small norms: ‖dW_l‖ = ‖δ_l‖ ‖a_{l-1}‖, and one
    factor shrinks as the other grows."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(12)))
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    verdict = watched(model).verdicts[0]
    assert (verdict.kind, verdict.layer) == ("vanishing", "11")
    assert "activation" in verdict.evidence


def test_vanishing_against_its_own_past():
    model = network(depth=2)
    monitor = GradientMonitor(model, every=1)
    train(model, monitor, 8)
    assert not any(r.verdicts for r in monitor.history)
    scaled = model[0].register_forward_hook(
        lambda module, args, output: output * 1e-4 + (output * (1 - 1e-4)).detach()
    )
    (verdict,) = train(model, monitor, 1)[-1].verdicts
    scaled.remove()
    assert (verdict.kind, verdict.layer) == ("vanishing", "0")
    assert "was" in verdict.evidence


def test_exploding_through_the_network():
    model = network(depth=12)
    for p in model.parameters():
        nn.init.normal_(p, std=1.5)
    verdict = watched(model, steps=1).verdicts[0]
    assert verdict.kind == "exploding"
    assert verdict.layer in ("22", "23", "24")
    assert "clip_grad_norm_" in verdict.cure


def test_exploding_against_its_own_past():
    model = network()
    monitor = GradientMonitor(model, every=1, activations=False)
    train(model, monitor, 6)
    assert not any(r.verdicts for r in monitor.history)
    (verdict,) = train(model, monitor, 1, loss=lambda y: 1e5 * y.square().mean(), rate=0)[
        -1
    ].verdicts
    assert verdict.kind == "exploding"
    assert "times the largest of the past" in verdict.evidence


def test_an_update_larger_than_the_weights():
    verdicts = watched(network(), steps=2, rate=1e3).verdicts
    assert "exploding" in [v.kind for v in verdicts]
    assert any("as large as the weights" in v.evidence for v in verdicts)


def test_nan_begins_in_forward():
    model = network()
    model[2].weight.data[0, 0] = math.nan
    (verdict,) = watched(model, steps=1).verdicts
    assert (verdict.kind, verdict.layer) == ("non-finite", "2")
    assert "set_detect_anomaly" in verdict.cure


@pytest.mark.parametrize("activations", [True, False])
def test_nan_begins_in_backward(activations):
    class Root(nn.Module):
        def forward(self, x):
            return (x * 0).sqrt() + x  # 0 in forward, 0 · ∞ in backward

    model = network()
    model[3] = Root()
    monitor = GradientMonitor(model, every=1, activations=activations)
    (verdict,) = train(model, monitor, 1)[-1].verdicts
    assert (verdict.kind, verdict.layer) == ("non-finite", "2")
    reading = monitor.history[-1]
    assert reading["2"].nonfinite > 0.9
    assert reading["4"].nonfinite == 0
    assert math.isnan(reading["2"].norm)


@pytest.mark.parametrize(
    "last",
    [
        lambda: nn.LayerNorm(5),
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        lambda: nn.BatchNorm1d(5),
        lambda: nn.Softmax(-1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_should_be_zero_gets_no_verdict(last, dtype):
    """The sum of a normalised output is constant: its gradient is zero, or a rounding error."""
    model = nn.Sequential(*network(nn.Tanh, depth=4), last()).to(dtype)
    x = torch.randn(32, 16, dtype=dtype)
    monitor = GradientMonitor(model, every=1)
    for _ in range(6):
        model.zero_grad()
        model(x).sum().backward()
        reading = monitor.step()
        assert reading["0"].norm < 0.1 * max(1.0, reading.norm)
        assert not reading.verdicts


def test_rounding_before_a_normalisation_is_not_reported_as_dead_units():
    """In every batch the gradient of another part of the units rounds to zero."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = init_for(nn.Sequential(*network(nn.ReLU, depth=2), nn.LayerNorm(5)), "relu")
        monitor = GradientMonitor(model, every=1)
        for _ in range(6):
            model.zero_grad()
            model(torch.randn(8, 16)).sum().backward()
            assert not [v for v in monitor.step().verdicts if v.kind == "dead units"]


def test_a_run_that_starts_without_a_gradient():
    model, monitor_steps = network(), []
    monitor = GradientMonitor(model, every=1)
    for step in range(8):
        model.zero_grad()
        x, y = batch()
        (cross_entropy(model(x), y) * (step > 3)).backward()
        monitor_steps.append(monitor.step())
    assert not [v for v in monitor_steps[-1].verdicts if v.kind == "exploding"]


def test_layers_are_judged_in_the_order_of_forward():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))

        def forward(self, x):
            for layer in reversed(self.layers):
                x = torch.sigmoid(layer(x))
            return x

    monitor = GradientMonitor(model := Reversed(), every=1)
    model(torch.randn(32, 16)).square().sum().backward()
    verdicts = monitor.step().verdicts
    assert [(v.kind, v.layer) for v in verdicts] == [("vanishing", "layers.11")]


def test_a_checkpoint_that_recomputes_in_backward_does_not_change_the_order():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(12)
            )
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return self.head(x)

    model = Blocks()
    monitor = GradientMonitor(model, every=1)
    F.cross_entropy(model(torch.randn(33, 16)), torch.randint(0, 5, (33,))).backward()
    seen = monitor.step()
    assert kinds(seen.verdicts) == [("vanishing", "first")]
    assert seen["blocks.3.0"].activation_std > 0


@pytest.mark.parametrize(
    ("activation", "normalise"),
    [(nn.ReLU, None), (nn.Tanh, None), (nn.GELU, nn.LayerNorm), (nn.Sigmoid, nn.BatchNorm1d)],
)
def test_healthy_networks_get_no_verdict(activation, normalise):
    """From the start until the loss is almost zero, where gradients have fallen by decades for a
    good reason."""
    model = network(activation, depth=6, width=64, normalise=normalise)
    if normalise is None:
        init_for(model, activation.__name__.lower())
    x, y = torch.randn(40, 64), torch.randint(0, 5, (40,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    monitor = GradientMonitor(model, every=5)
    for _ in range(150):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        monitor.step()
        optimizer.step()
    assert loss < 0.01
    assert monitor.history[-1].norm < 0.1 * monitor.history[0].norm
    assert [v for r in monitor.history for v in r.verdicts] == []


def test_every_verdict_has_a_cure():
    assert set(CURES) == {"vanishing", "exploding", "dead units", "non-finite"}
    assert judge(Reading(1, math.nan, None, (Layer("a"),)), []) == []
