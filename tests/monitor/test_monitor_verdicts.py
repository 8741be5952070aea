"""The monitor's verdicts: each threshold from both sides, the halves of the history, and what makes
a unit dead rather than unasked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from custom_backprop.monitor import GradientMonitor, Layer, Reading, judge
from custom_backprop.monitor.outputs import tensors_of
from custom_backprop.nn import LinearActivation


def kinds(verdicts):
    return [(v.kind, v.layer) for v in verdicts]


def reading(norm=1.0, norms=(0.5, 0.5), update=None, dead=None, std=1.0):
    """Layers "0", "1", ... with these gradients; ``dead`` and ``std`` are those of layer 0, of all
    others 0 and 1."""
    layers = [
        Layer(
            str(i),
            n,
            nonfinite=0.0,
            dead=0.0 if i else dead,
            activation_std=1.0 if i else std,
            update=update,
        )
        for i, n in enumerate(norms)
    ]
    return Reading(1, norm, update, tuple(layers))


# Thresholds


@pytest.mark.parametrize(("times", "said"), [(99, []), (101, [("exploding", "1")])])
def test_a_surge(times, said):
    assert kinds(judge(reading(times, (0.1, times)), [reading()] * 4)) == said


@pytest.mark.parametrize(("before", "said"), [(3, []), (4, [("exploding", "0")])])
def test_a_surge_is_none_at_the_start_of_a_run(before, said):
    assert kinds(judge(reading(200), [reading()] * before)) == said


@pytest.mark.parametrize("length", [4, 5, 6])
def test_a_surge_is_measured_at_the_most_of_the_older_half(length):
    """One past reading was as large: 200 is news unless that was in the older half."""
    for place in range(length):
        history = [reading(100.0 if i == place else 1.0) for i in range(length)]
        assert bool(judge(reading(200), history)) is (place >= length // 2), place


@pytest.mark.parametrize(("part", "said"), [(1.1e-3, []), (0.9e-3, [("vanishing", "0")])])
def test_a_lost_part(part, said):
    """Of the layer's own past, 0.4; the network's total fell too, and does not count."""
    history = [reading(10.0, (4.0, 9.0))] * 4
    assert kinds(judge(reading(1.0, (0.4 * part, 0.02), dead=0.0), history)) == said


@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_lost_part_is_measured_at_the_median_of_the_older_half(length):
    half = length // 2
    old, new = [reading(norms=(0.5, 0.5))] * half, [reading(norms=(1e-4, 0.5))] * (length - half)
    now = reading(norms=(1.1e-4, 0.011))
    assert kinds(judge(now, old + new)) == [("vanishing", "0")]
    assert judge(now, new[:half] + [*old, *new][: length - half]) == []


def test_one_odd_reading_is_no_past():
    """Of three: most of the older half had next to nothing."""
    history = [reading(norms=(n, 0.5)) for n in (1e-4, 0.5, 1e-4, 0.5, 0.5, 0.5)]
    assert judge(reading(norms=(1.1e-4, 0.011)), history) == []


def test_a_step_without_any_gradient_loses_nothing():
    assert judge(reading(0.0, (0.0, 0.0)), [reading()] * 6) == []
    assert judge(reading(norms=(5e-4, 0.05)), [reading(0.0, (0.0, 0.0))] * 6) == []


@pytest.mark.parametrize(("decades", "said"), [(3.9, False), (4.1, True)])
def test_a_fall_through_the_network(decades, said):
    norms = [10 ** (-decades * i / 4) for i in range(5)]
    assert kinds(judge(reading(norms=norms[::-1]), [])) == [("vanishing", "0")] * said
    assert kinds(judge(reading(norms=norms), [])) == [("exploding", "0")] * said


@pytest.mark.parametrize(("decades", "said"), [(3.9, False), (4.1, True)])
def test_a_fall_of_the_activations(decades, said):
    deviations = [10 ** (-decades * i / 4) for i in range(5)]

    def outputs(values):
        return Reading(
            1,
            1.0,
            None,
            tuple(
                Layer(str(i), 0.5, nonfinite=0.0, activation_std=s) for i, s in enumerate(values)
            ),
        )

    assert kinds(judge(outputs(deviations), [])) == [("vanishing", "4")] * said
    assert kinds(judge(outputs(deviations[::-1]), [])) == [("exploding", "4")] * said


@pytest.mark.parametrize(("update", "said"), [(0.99, []), (1.01, [("exploding", "0")])])
def test_an_update(update, said):
    assert kinds(judge(reading(update=update), [])) == said


@pytest.mark.parametrize(("dead", "said"), [(0.74, []), (0.76, [("dead units", "0")])])
def test_most_units_dead(dead, said):
    assert kinds(judge(reading(dead=dead), [])) == said
    assert kinds(judge(reading(dead=dead), [reading(dead=dead)] * 9)) == said


@pytest.mark.parametrize(("dead", "said"), [(0.34, []), (0.36, [("dead units", "0")])])
def test_units_that_died(dead, said):
    """A quarter more than once; when that was does not matter, nor that a layer was frozen
    before."""
    for place in range(5):
        history = [reading(dead=0.1 if i == place else 0.6) for i in range(5)]
        assert kinds(judge(reading(dead=dead), history)) == said
    assert judge(reading(dead=dead), [reading(dead=None)] * 5) == []


@pytest.mark.parametrize(("before", "said"), [(2, []), (3, [("dead units", "0")])])
def test_gradients_alone_must_say_it_four_times(before, said):
    def silent(dead=0.9):
        return reading(dead=dead, std=None)

    verdicts = judge(silent(), [silent()] * before)
    assert kinds(verdicts) == said
    assert all("4 times in a row" in v.evidence for v in verdicts)
    assert judge(silent(), [silent()] * 3 + [silent(0.0)] + [silent()] * 2) == []
    assert kinds(judge(silent(), [silent(0.0)] + [silent()] * 3)) == [("dead units", "0")]


def beneath(norm, rest, normalised, dead=0.9):
    """Layer 0, a module without parameters, layer 2, whose gradient is ``rest``."""
    layers = (
        Layer("0", norm, nonfinite=0.0, dead=dead),
        Layer("1"),
        Layer("2", rest, nonfinite=0.0),
        Layer("3", 1.0, nonfinite=0.0),
    )
    layers = tuple(Layer(**{**vars(layer), "activation_std": 1.0}) for layer in layers)
    return kinds(judge(Reading(1, 1.0, None, layers), [], normalised))


def test_what_rounding_leaves_beneath_a_normalisation():
    assert beneath(0.9e-4, 1.0, {"1"}) == []
    assert beneath(1.1e-4, 1.0, {"1"}) == [("dead units", "0")]
    assert beneath(0.9e-4, 1.0, set()) == [("dead units", "0")]


def test_what_lies_beneath_a_rounded_gradient_is_rounding_too():
    assert beneath(0.9e-5, 1e-9, {"3"}) == []
    assert beneath(1.1e-5, 1e-9, {"3"}) == [("dead units", "0")]


# Dead, or not asked


class Functional(nn.Module):
    """Three layers, with an activation that no hook sees."""

    def __init__(self, activation, out=50):
        super().__init__()
        self.a, self.b, self.c, self.activation = (
            nn.Linear(16, 32),
            nn.Linear(32, 32),
            nn.Linear(32, out),
            activation,
        )

    def forward(self, x):
        return self.c(self.activation(self.b(self.activation(self.a(x)))))

    def __getitem__(self, i):
        return {0: self.a, 2: self.b, 4: self.c}[i]


def sequential(activation=nn.ReLU):
    return nn.Sequential(
        nn.Linear(16, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 50)
    )


class LinearReLU(nn.Linear):
    """A layer of somebody's own that has its activation in it."""

    def forward(self, x):
        return F.relu(super().forward(x))


def fused(layer, **options):
    """Each output goes straight into the next layer."""
    model = Functional(lambda x: x)
    model.a, model.b = layer(16, 32, **options), layer(32, 32, **options)
    return model


NETWORKS = {
    "relu": sequential,
    "in place": lambda: sequential(lambda: nn.ReLU(inplace=True)),
    "relu6": lambda: sequential(nn.ReLU6),
    "relu6 in place": lambda: sequential(lambda: nn.ReLU6(inplace=True)),
    "normalised": lambda: sequential(
        lambda: nn.Sequential(nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
    ),
    "fused": lambda: fused(LinearActivation, activation="relu"),
    "fused relu6": lambda: fused(LinearActivation, activation="relu6"),
    "fused by another": lambda: fused(LinearReLU),
    "functional": lambda: Functional(F.relu),
    "functional in place": lambda: Functional(torch.relu_),
}


def one_asks(loss):
    """A hinge that all samples satisfy but the first."""

    def ranking(y):
        target = (y[:, 0] - y[:, 1]).detach().sign()
        target[0] *= -1
        return nn.MarginRankingLoss()(y[:, 0], y[:, 1], target)

    def embedding(y):
        distance = y.square().sum(dim=1)
        least = distance.detach().sort().values
        return nn.HingeEmbeddingLoss(margin=(least[0] + least[1]).item() / 2)(
            distance, -torch.ones(len(y))
        )

    def margin(y):
        target = y.argmax(dim=1)
        target[0] = y[0].detach().sort().indices[-2]
        return nn.MultiMarginLoss(margin=1e-9)(y, target)

    return {"ranking": ranking, "embedding": embedding, "margin": margin}[loss]


def unasked(layer):
    return (layer.weight.grad == 0).all(dim=1).float().mean().item()


@pytest.mark.parametrize("loss", ["ranking", "embedding", "margin"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_that_asks_one_sample_kills_nobody(network, loss):
    model, x = NETWORKS[network](), torch.randn(64, 16)
    monitor = GradientMonitor(model, every=1)
    for step in range(3):
        model.zero_grad()
        y = model(x)
        (one_asks(loss)(y) if step == 2 else F.cross_entropy(y, torch.arange(64) % 50)).backward()
        verdicts = monitor.step().verdicts
        assert not [v for v in verdicts if v.kind == "dead units"]
    if network != "normalised":  # whose batch statistics carry the gradient to every sample
        assert max(unasked(model[i]) for i in (0, 2, 4)) > 0.3, "the gradients alone look dead"


@pytest.mark.parametrize("loss", ["ranking", "margin"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_dead_layer_is_named_under_any_loss(network, loss):
    model, x = NETWORKS[network](), torch.randn(64, 16)
    with torch.no_grad():
        if network == "normalised":
            model[3][0].bias.fill_(-100)
        else:
            model[2].bias.fill_(100 if "relu6" in network else -100)
    monitor = GradientMonitor(model, every=1)
    one_asks(loss)(model(x) + torch.randn(64, 50)).backward()
    verdicts = monitor.step().verdicts
    assert kinds(v for v in verdicts if v.kind == "dead units") == [
        ("dead units", monitor.names[monitor._modules.index(model[2])])
    ]


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("batched", [True, False])
def test_dead_channels(conv, batched):
    """Of eight, six, while nothing arrives at any; the units stand in the second dimension, or in
    the first."""
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[conv]
    model = nn.Sequential(conv(2, 8, 3), nn.ReLU(), conv(8, 3, 1))
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].bias.copy_(torch.tensor([-100] * 6 + [100] * 2))
    monitor = GradientMonitor(model, every=1)
    model(torch.randn(*([4] if batched else []), 2, *[5] * dims)).square().sum().backward()
    assert monitor.step()["0"].dead == 0.75


class Adapter(nn.Module):
    """LoRA: a frozen layer, and two beside it, of which the second is zero at the start."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


def test_layers_before_a_zero_one_are_not_dead():
    """LoRA's start, and a head that starts at zero: nothing arrives yet. The sample is one, of one
    sign, as tokens with a mean are."""
    adapted = nn.Sequential(Adapter(16, 16), nn.ReLU(), Adapter(16, 5))
    nn.init.uniform_(adapted[0].down.weight, -1, 0)
    headed = nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)
    )
    nn.init.zeros_(headed[4].weight)
    for model, silent in ((adapted, adapted[0].down), (headed, headed[2])):
        monitor = GradientMonitor(model, every=1)
        for _ in range(2):
            model.zero_grad()
            F.cross_entropy(model(torch.rand(33, 16)), torch.randint(0, 5, (33,))).backward()
            assert unasked(silent) == 1
            assert monitor.step().verdicts == ()


def negative_heads(join):
    """Two heads under a hinge; no output of the first is ever positive, and nothing acts on it."""
    model = nn.ModuleDict(
        {"body": nn.Linear(16, 16), "first": nn.Linear(16, 20), "second": nn.Linear(16, 20)}
    )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            h = self.parts.body(x)
            return join(self.parts.first(h), self.parts.second(h))

    with torch.no_grad():
        model["first"].bias.fill_(-100)
    return Model()


@pytest.mark.parametrize("join", [lambda a, b: {"first": a, "rest": [b]}, lambda a, b: (a, b)])
def test_a_head_that_is_not_asked(join):
    model = negative_heads(join)
    monitor = GradientMonitor(model, every=1)
    first, second = tensors_of(model(torch.randn(33, 16)))
    (one_asks("margin")(first) + F.cross_entropy(second, torch.arange(33) % 20)).backward()
    assert unasked(model.parts.first) > 0.75
    assert monitor.step().verdicts == ()


def test_a_head_that_is_called_by_itself():
    """The model as a whole is never called: what it returns is what its last layer returns."""
    model = negative_heads(lambda a, b: (a, b))
    monitor = GradientMonitor(model, every=1)
    one_asks("margin")(model.parts.first(model.parts.body(torch.randn(33, 16)))).backward()
    assert unasked(model.parts.first) > 0.75
    assert monitor.step().verdicts == ()


def test_a_unit_is_silent_in_a_whole_window():
    """Its output moves in the first step alone. A checkpoint between the two knows of it; the next
    window does not."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)

    def step(x, *monitors):
        model.zero_grad()
        model(x).square().sum().backward()
        return [monitor.step() for monitor in monitors]

    whole = GradientMonitor(model, every=2, measure=2)
    step(torch.randn(5, 3), whole)
    restored = GradientMonitor(model, every=2, measure=2)
    restored.load_state_dict(whole.state_dict())
    assert [r["0"].dead for r in step(torch.zeros(5, 3), whole, restored)] == [0, 0]
    step(torch.zeros(5, 3), whole, restored)
    assert [r["0"].dead for r in step(torch.zeros(5, 3), whole, restored)] == [1, 1]


def test_a_checkpoint_knows_what_met_no_activation():
    """The first layer, whose output is never positive, went straight into the second; the rest of
    the window leaves it out."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.uniform_(model[0].weight, -1, 0)
    whole = GradientMonitor(model, every=2, measure=2)
    model(torch.rand(5, 3)).square().sum().backward()
    whole.step()
    restored = GradientMonitor(model, every=2, measure=2)
    restored.load_state_dict(whole.state_dict())
    model[1](torch.rand(5, 4)).square().sum().backward()
    assert [monitor.step()["0"].dead for monitor in (whole, restored)] == [0, 0]


def test_compiled_layers_are_judged_when_their_gradients_stay_away():
    model = sequential()
    with torch.no_grad():
        model[2].bias.fill_(-100)
    compiled = torch.compile(model, backend="eager")
    monitor = GradientMonitor(compiled, every=1)
    said = []
    for _ in range(4):
        model.zero_grad()
        F.cross_entropy(compiled(torch.randn(33, 16)), torch.randint(0, 50, (33,))).backward()
        said.append(kinds(monitor.step().verdicts))
    assert said == [[], [], [], [("dead units", "2")]]


def test_a_checkpoint_that_calls_in_backward_does_not_turn_the_order():
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
