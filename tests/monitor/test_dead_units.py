"""Dead units, and units that are not dead but get no gradient."""

from __future__ import annotations

import pytest
import torch
from monitor_helpers import kinds, network, train, watched
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from custom_backprop.monitor import (
    GradientMonitor,
)
from custom_backprop.nn import LinearActivation


@pytest.mark.parametrize("bias", [True, False])
def test_dead_layer(bias):
    """All units of layer 2 are off. Without biases layer 4 gets no gradient either, since its input
    is 0. Layer 2 is the cause."""
    model = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(16, 16, bias=bias), nn.ReLU())), nn.Linear(16, 5)
    )
    with torch.no_grad():
        model[2].weight.copy_(-model[2].weight.abs())
        if bias:
            model[2].bias.fill_(-9)
    verdicts = watched(model, steps=1).verdicts
    assert [(v.kind, v.layer) for v in verdicts] == [("dead units", "2")]
    assert "leaky_relu" in verdicts[0].cure


def test_units_that_die():
    model = network(width=16)
    monitor = GradientMonitor(model, every=1)
    train(model, monitor, 2)
    assert not any(r.verdicts for r in monitor.history)
    model[2].bias.data[:8] = -100
    assert [(v.kind, v.layer) for v in train(model, monitor, 1)[-1].verdicts] == [
        ("dead units", "2")
    ]


def test_a_unit_is_alive_if_any_step_of_the_window_reaches_it():
    model = nn.Linear(3, 4)
    monitor = GradientMonitor(model, every=2, measure=2, activations=False)
    for i in (0, 1):
        model.zero_grad()
        model(torch.ones(1, 3))[0, i].backward()
        reading = monitor.step()
    assert reading[monitor.names[0]].dead == 0.5


def test_an_input_of_zeros():
    """The input is zero, and passes a module without parameters and a layer without a bias."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))
    monitor = GradientMonitor(model, every=1)
    cross_entropy(model(torch.zeros(9, 16)), torch.randint(0, 5, (9,))).backward()
    assert [v.layer for v in monitor.step().verdicts if v.kind == "dead units"] in (
        [],
        ["0"],
        ["1"],
    )


class Functional(nn.Module):
    """Three layers with an activation that no hook can see."""

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
    """A user's own layer that includes its activation."""

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
    """A hinge loss that is zero for all samples except the first."""

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
def test_a_loss_of_one_sample_leaves_no_unit_dead(network, loss):
    model, x = NETWORKS[network](), torch.randn(64, 16)
    monitor = GradientMonitor(model, every=1)
    for step in range(3):
        model.zero_grad()
        y = model(x)
        (one_asks(loss)(y) if step == 2 else F.cross_entropy(y, torch.arange(64) % 50)).backward()
        verdicts = monitor.step().verdicts
        assert not [v for v in verdicts if v.kind == "dead units"]
    if network != "normalised":  # batch statistics pass the gradient on to every sample
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
    dead = next(name for name, module in model.named_modules() if module is model[2])
    assert kinds(v for v in verdicts if v.kind == "dead units") == [("dead units", dead)]


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("batched", [True, False])
def test_dead_channels(conv, batched):
    """Six of eight are dead, and none gets a gradient. Units are the second dimension, or the
    first."""
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[conv]
    model = nn.Sequential(conv(2, 8, 3), nn.ReLU(), conv(8, 3, 1))
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].bias.copy_(torch.tensor([-100] * 6 + [100] * 2))
    monitor = GradientMonitor(model, every=1)
    model(torch.randn(*([4] if batched else []), 2, *[5] * dims)).square().sum().backward()
    assert monitor.step()["0"].dead == 0.75


class Adapter(nn.Module):
    """LoRA: a frozen layer with two layers beside it. The second of them starts at zero."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


def test_layers_before_a_zero_one_are_not_dead():
    """With LoRA, or a head that starts at zero, no gradient passes at first. There is one sample,
    all of one sign, as tokens with a mean."""
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
    """Two heads under a hinge loss. The first one's outputs are never positive, and no activation
    follows it."""
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
def test_a_head_without_a_gradient(join):
    model = negative_heads(join)
    monitor = GradientMonitor(model, every=1)
    first, second = tree_leaves(model(torch.randn(33, 16)))
    (one_asks("margin")(first) + F.cross_entropy(second, torch.arange(33) % 20)).backward()
    assert unasked(model.parts.first) > 0.75
    assert monitor.step().verdicts == ()


def test_a_head_that_is_called_by_itself():
    """The model itself is never called: its output is that of its last layer."""
    model = negative_heads(lambda a, b: (a, b))
    monitor = GradientMonitor(model, every=1)
    one_asks("margin")(model.parts.first(model.parts.body(torch.randn(33, 16)))).backward()
    assert unasked(model.parts.first) > 0.75
    assert monitor.step().verdicts == ()


def test_a_unit_is_silent_in_a_whole_window():
    """Its output changes in the first step only. A checkpoint between the steps remembers this, and
    the next window forgets it."""
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


def test_a_checkpoint_remembers_layers_without_an_activation():
    """The output of the first layer, which is never positive, went straight into the second. The
    rest of the window does not use it."""
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


def test_compiled_layers_are_judged_when_their_gradients_are_missing():
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
