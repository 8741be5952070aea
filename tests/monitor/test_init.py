"""Initialisation: the gains equal the integrals, the table agrees with the computation, and the
variance is one after twenty layers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import custom_backprop
from custom_backprop.formulas.activation import ACTIVATIONS
from custom_backprop.init import DRIFT, gain, init_for, propagation
from custom_backprop.nn import Linear, LinearActivation

NAMES = [name for name in ACTIVATIONS if name != "threshold"]  # it has no default
DEEP = [name for name in NAMES if propagation(name).slope <= DRIFT]
DEPTH, WIDTH = 20, 128


def network(activation, depth=DEPTH, width=WIDTH):
    return nn.Sequential(
        *(LinearActivation(width, width, activation=activation) for _ in range(depth)),
        Linear(width, width),
    )


def second_moment(model, n=128):
    """The second moment of the last layer's output, the mean over fresh inputs."""
    with torch.no_grad():
        return model(torch.randn(n, model[0].in_features)).square().mean().item()


def bound(slope):
    """By what factor the variance may be off after twenty layers: the random error of one layer
    (about 12 % at this width), multiplied by the slope."""
    return 1.35 if slope < 0.6 else 2.0 if slope < 0.95 else 4.0 if slope <= 1.0 else 12.0


@pytest.mark.parametrize("method", ["kaiming", "xavier", "orthogonal"])
@pytest.mark.parametrize("activation", DEEP)
def test_variance_is_preserved_through_twenty_layers(activation, method):
    moment = second_moment(init_for(network(activation), activation, method))
    limit = bound(propagation(activation).slope)
    assert 1 / limit < moment < limit


@pytest.mark.parametrize("activation", [n for n in NAMES if propagation(n).slope < 1.3])
def test_lsuv_preserves_it_for_the_others_too(activation):
    """Exactly for the same batch, and nearly for fresh inputs."""
    x, model = torch.randn(128, WIDTH), network(activation)
    assert init_for(model, activation, "lsuv", batch=x) is model
    with torch.no_grad():
        assert model(x).std().item() == pytest.approx(1, rel=1e-4)
    assert 0.3 < second_moment(model) < 3


def test_wrong_gains_exceed_the_bounds():
    """Slightly wrong gains exceed the bounds."""
    model = init_for(network("relu"), "relu")
    for layer in model:
        layer.weight.data.mul_(0.9)
    assert second_moment(model) < 1 / bound(1.0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "linear"])
def test_gains_are_torchs_where_it_derives_them(activation):
    assert gain(activation) == pytest.approx(nn.init.calculate_gain(activation), rel=1e-9)


def test_gain_of_parameters():
    assert gain("leaky_relu", negative_slope=0.3) == pytest.approx(
        nn.init.calculate_gain("leaky_relu", 0.3), rel=1e-9
    )
    assert propagation("selu") == pytest.approx((1, 1.0352, 0.7826), rel=1e-3), (
        "SELU is made for gain 1"
    )


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "softsign"])
def test_integrals_against_samples(activation):
    """E f², E f'² and the change of E f² with the variance, against four million samples and
    autograd."""
    z = torch.randn(4_000_000, dtype=torch.float64, requires_grad=True)
    f = getattr(custom_backprop.functional, activation)

    y = f(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    found, square = propagation(activation), y.square().mean().item()
    assert found.gain == pytest.approx(square**-0.5, rel=3e-3)
    assert found.gradient == pytest.approx(
        math.sqrt(slope.square().mean().item() / square), rel=3e-3
    )
    with torch.no_grad():
        up, down = (f(z * math.sqrt(q)).square().mean().item() for q in (1.01, 0.99))
    assert found.slope == pytest.approx((up - down) / 0.02 / square, rel=1e-2)


def test_the_table_agrees_with_the_computation():
    rows = re.findall(
        r"^(\w+) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4})$",
        custom_backprop.init.__doc__,
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == ["linear", *NAMES]
    for name, *values in rows:
        assert [float(v) for v in values] == pytest.approx(propagation(name), abs=5.1e-5)


def test_gradients_shrink_as_the_table_says():
    """By sigmoid's b in every layer: no initialisation helps."""
    model = init_for(network("sigmoid"), "sigmoid")
    model(torch.randn(128, WIDTH)).sum(dim=1).mean().backward()
    norms = [layer.bias.grad.norm().item() for layer in model]
    assert (norms[0] / norms[-1]) ** (1 / DEPTH) == pytest.approx(
        propagation("sigmoid").gradient, rel=0.15
    )


@pytest.mark.parametrize(
    ("method", "deviation"),
    [("kaiming", (1 / 50) ** 0.5), ("xavier", (2 / 250) ** 0.5), ("orthogonal", (1 / 50) ** 0.5)],
)
def test_deviation_of_a_rectangle(method, deviation):
    """50 -> 200 -> 50; the second layer has tanh's gain."""
    model = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 50))
    init_for(model, "tanh", method)
    assert model[0].weight.std().item() == pytest.approx(deviation, rel=0.05)
    second = {"kaiming": (1 / 200) ** 0.5, "xavier": deviation, "orthogonal": (1 / 200) ** 0.5}[
        method
    ]
    assert model[2].weight.std().item() == pytest.approx(second * gain("tanh"), rel=0.05)
    assert not model[0].bias.any()


@pytest.mark.parametrize("method", ["kaiming", "xavier", "orthogonal"])
@pytest.mark.parametrize(("groups", "out"), [(1, 128), (4, 128), (64, 64), (64, 192)])
def test_variance_of_grouped_convolutions(method, groups, out):
    """Measured, forward and backward. The fans are those of one group. With circular padding every
    pixel has all its neighbours."""
    pad = {"padding": 1, "padding_mode": "circular", "bias": False}
    model = nn.Sequential(nn.Conv2d(2, 64, 3, **pad), nn.Conv2d(64, out, 3, groups=groups, **pad))
    init_for(model, "linear", method)
    x = torch.randn(16, 64, 12, 12, requires_grad=True)
    y = model[1](x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    fan_in, fan_out = 64 // groups * 9, out // groups * 9
    variance = {"xavier": 2 / (fan_in + fan_out)}.get(method, 1 / fan_in)
    assert y.var().item() == pytest.approx(fan_in * variance, rel=0.15)
    assert dx.var().item() == pytest.approx(fan_out * variance, rel=0.15)


def test_each_group_is_orthogonal():
    model = init_for(
        nn.Sequential(
            nn.Linear(3, 3), nn.Conv1d(32, 48, 3, groups=4), nn.Conv1d(32, 64, 1, groups=8)
        ),
        "tanh",
        "orthogonal",
    )
    for rows in model[1].weight.detach().flatten(1).chunk(4):
        torch.testing.assert_close(
            rows @ rows.T, gain("tanh") ** 2 * torch.eye(12), rtol=1e-4, atol=1e-4
        )
    for rows in model[2].weight.detach().flatten(1).chunk(8):
        torch.testing.assert_close(
            rows.T @ rows, 2 * gain("tanh") ** 2 * torch.eye(4), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["kaiming", "xavier", "orthogonal", "lsuv"])
def test_half_precision(method, dtype):
    model = network("relu", 2, 64).to(dtype)
    init_for(
        model, "relu", method, batch=torch.randn(64, 64, dtype=dtype) if method == "lsuv" else None
    )
    assert model[1].weight.dtype is dtype
    assert model[1].weight.float().std().item() == pytest.approx(
        gain("relu") / 8, rel=0.1 if method == "lsuv" else 0.05
    )


class Tied(nn.Module):
    """Two modules that share a weight. One of them has two names, and they are called in another
    order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.twin = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.twin.weight, self.again = self.shared.weight, self.first

    def forward(self, x):
        x = torch.tanh(self.again(input=x))
        return self.shared(torch.tanh(self.twin(x)))


@pytest.mark.parametrize("method", ["kaiming", "xavier", "orthogonal"])
def test_shared_weights_are_drawn_once(method):
    """With the same values as if the other uses were not there, and with the gain of the first."""
    alone, tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Tied()
    for model in (alone, tied):
        init_for(model, "tanh", method, generator=torch.Generator().manual_seed(3))
    assert torch.equal(tied.first.weight, alone[0].weight)
    assert torch.equal(tied.shared.weight, alone[1].weight)
    assert not tied.twin.bias.any()

    both = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    both[2].weight = both[0].weight
    init_for(both, "tanh", method)
    assert both[0].weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_lsuv_scales_a_shared_weight_at_its_first_use():
    x, model = torch.randn(256, 64), Tied()
    init_for(model, "tanh", "lsuv", batch=x)
    with torch.no_grad():
        first = model.first(x)
        assert first.std().item() == pytest.approx(1, rel=1e-4)
        assert model.twin(torch.tanh(first)).std().item() == pytest.approx(1, rel=1e-4)


def test_convolutions_and_what_is_not_changed():
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.BatchNorm2d(24),
        nn.SiLU(),
        nn.Conv2d(24, 24, 3, groups=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    with pytest.raises(ValueError, match="layer '5' is lazy"):
        init_for(model, "silu")
    x = torch.randn(16, 3, 9, 9)
    model(x)
    norm = {k: v.clone() for k, v in model[1].state_dict().items()}
    init_for(model, "silu", generator=torch.Generator().manual_seed(3))
    assert model[3].weight.std().item() == pytest.approx(gain("silu") / math.sqrt(12 * 9), rel=0.1)
    again = [p.clone() for p in model.parameters()]
    init_for(model, "silu", generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(again, model.parameters(), strict=True))
    init_for(model, "silu", "lsuv", batch=x)
    assert model(x).std().item() == pytest.approx(1, rel=1e-4)
    model[1].load_state_dict(norm | {"num_batches_tracked": model[1].num_batches_tracked})
    init_for(model, "silu", "lsuv", batch=(x,))
    assert all(
        torch.equal(norm[k], v) for k, v in model[1].state_dict().items() if k.startswith("running")
    ), "running statistics are put back"
    assert not [h for m in model.modules() for h in m._forward_pre_hooks]


def test_activations_without_a_stable_gain():
    assert set(NAMES) - set(DEEP) == {
        "silu",
        "hardswish",
        "tanhshrink",
        "softshrink",
        "relu_squared",
    }
    with pytest.raises(
        ValueError,
        match=r"relu_squared: a deviation .* grows 2\.00-fold in each layer.*method='lsuv'",
    ):
        init_for(network("relu_squared", 2), "relu_squared")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ("relu",),
            {"method": "he"},
            ValueError,
            "no method 'he': choose one of kaiming, xavier, orthogonal, lsuv",
        ),
        (("swish",), {}, ValueError, "no activation 'swish': choose one of linear, relu"),
        (("relu",), {"negative_slope": 0.1}, TypeError, "relu has no parameter negative_slope"),
        (("relu", "lsuv"), {}, ValueError, "give it a batch"),
        (("relu",), {"batch": torch.ones(2, 4)}, ValueError, "kaiming takes no batch"),
        (("tanh",), {}, ValueError, "layer '0' applies 'relu', not 'tanh'"),
        (
            ("relu", "lsuv"),
            {"batch": torch.zeros(3, 4)},
            ValueError,
            "the output of layer '0' has the deviation 0",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        init_for(network("relu", 2, 4), *arguments, **options)


def test_errors_of_the_model():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        init_for("model", "relu")
    with pytest.raises(ValueError, match="no linear layer and no convolution"):
        init_for(nn.ReLU(), "relu")
    leaky = LinearActivation(3, 3, activation="leaky_relu", negative_slope=0.2)
    with pytest.raises(
        ValueError,
        match=r"applies 'leaky_relu', negative_slope=0\.2, not 'leaky_relu', negative_slope=0\.1",
    ):
        init_for(leaky, "leaky_relu", negative_slope=0.1)
    assert init_for(leaky, "leaky_relu", negative_slope=0.2) is leaky

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="did not reach 'unused'"):
        init_for(Half(), "relu", "lsuv", batch=torch.randn(4, 3))
