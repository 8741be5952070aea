"""The monitor: what it measures equals torch's own numbers; planted troubles are named with their
layer, healthy networks are not."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import math
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from custom_backprop.init import init_for
from custom_backprop.monitor import (
    CURES,
    GradientMonitor,
    JSONLines,
    Layer,
    Reading,
    TensorBoard,
    falls,
    judge,
)


def network(activation=nn.ReLU, depth=3, width=16, normalise=None):
    layers = []
    for _ in range(depth):
        layers += [
            nn.Linear(width, width),
            *([normalise(width)] if normalise else []),
            activation(),
        ]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def batch(n=33, width=16):
    return torch.randn(n, width), torch.randint(0, 5, (n,))


def train(model, monitor=None, steps=3, rate=0.05, loss=None, optimizer=None):
    """Some steps on one batch. Returns the readings."""
    x, y = batch()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), rate)
    readings = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        (loss(output) if loss else cross_entropy(output, y)).backward()
        if monitor is not None:
            readings.append(monitor.step())
        optimizer.step()
    return readings


def watched(model, steps=3, **options):
    with GradientMonitor(model, every=1) as monitor:
        return train(model, monitor, steps, **options)[-1]


def hooks_of(model):
    return [
        h
        for m in model.modules()
        for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)
    ]


# What is measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_torchs(dtype):
    model = network().to(dtype)
    x, y = batch()
    x = x.to(dtype)
    weights = [p.detach().clone() for p in model.parameters()]
    monitor = GradientMonitor(model, every=2, measure=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outputs, gradients = [], []
    for _ in range(2):
        optimizer.zero_grad()
        kept = x
        for module in model:
            kept = module(kept)  # not the model's own call: the modules' hooks see it
            if module is model[1]:
                outputs.append(kept.detach().double().flatten())
        cross_entropy(kept, y).backward()
        gradients.append(
            torch.cat(
                [model[2].weight.grad.double().flatten(), model[2].bias.grad.double().flatten()]
            )
        )
        norm = nn.utils.get_total_norm([p.grad.double() for p in model.parameters()]).item()
        reading = monitor.step()
        optimizer.step()
        if reading is None:
            total, updated = norm, [p.detach().clone() for p in model.parameters()]
    close = {
        "rel": 1e-5 if dtype is torch.float32 else 1e-10 if dtype is torch.float64 else 1e-2,
        "abs": 1e-9,
    }
    gradient, output, layer = torch.cat(gradients), torch.cat(outputs), reading["2"]
    assert reading.norm == pytest.approx(math.sqrt((total**2 + norm**2) / 2), **close)
    assert layer.norm == pytest.approx(gradient.norm().item() / math.sqrt(2), **close)
    assert layer.mean == pytest.approx(gradient.mean().item(), rel=1e-2, abs=1e-5)
    assert layer.std == pytest.approx(gradient.std(correction=0).item(), **close)
    assert layer.zeros == pytest.approx((gradient == 0).double().mean().item())
    assert layer.nonfinite == 0
    relu = reading["1"]
    assert (relu.norm, relu.update, relu.dead) == (None, None, None)
    assert relu.activation_mean == pytest.approx(output.mean().item(), **close)
    assert relu.activation_std == pytest.approx(output.std(correction=0).item(), **close)
    assert relu.activation_zeros == pytest.approx((output == 0).double().mean().item())
    steps = torch.cat([(b - a).double().flatten() for a, b in zip(weights, updated, strict=True)])
    assert reading.update == pytest.approx(
        (steps.norm() / torch.cat([u.double().flatten() for u in updated]).norm()).item(), **close
    )


def test_a_vanished_gradient_has_a_norm():
    """1e-30 squared is no number of float32."""
    model = nn.Linear(3, 2)
    monitor = GradientMonitor(model, every=1)
    (model(torch.ones(1, 3)).sum() * 1e-30).backward()
    assert monitor.step().norm == pytest.approx(math.sqrt(8) * 1e-30, rel=1e-5, abs=0)


def test_windows_and_hooks():
    """Measured are the last step of a window and others evenly before it; hooks stand in those
    alone."""
    model = network()
    monitor = GradientMonitor(model, every=7, measure=2)
    standing, read = [], []
    for _ in range(14):
        standing.append(bool(hooks_of(model)))
        read.append(train(model, monitor, 1)[0] is not None)
    assert [i + 1 for i, s in enumerate(standing) if s] == [4, 7, 11, 14]
    assert [i + 1 for i, r in enumerate(read) if r] == [7, 14]
    assert [r.step for r in monitor.history] == [7, 14]


def test_training_is_untouched_and_remove_leaves_nothing():
    def run(watch):
        torch.manual_seed(1)
        model = nn.Sequential(network(normalise=nn.BatchNorm1d), nn.Dropout(0.2))
        monitor = GradientMonitor(model, every=3, measure=2) if watch else None
        train(model, monitor, 7, optimizer=torch.optim.Adam(model.parameters(), 0.01))
        if monitor:
            assert hooks_of(model)
            monitor.remove()
        assert not hooks_of(model)
        return model.state_dict()

    plain, seen = run(False), run(True)
    assert all(torch.equal(plain[k], seen[k]) for k in plain)


def test_a_validation_pass_is_not_counted():
    model = network()
    monitor = GradientMonitor(model, every=1)
    with torch.no_grad():
        model(torch.full((100, 16), 1e6))
    assert train(model, monitor, 1)[0]["0"].activation_std < 10


def test_shared_frozen_sparse_and_unused_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.unused = nn.Embedding(11, 4, sparse=True), nn.Linear(3, 3)
            self.lstm, self.frozen, self.head = (
                nn.LSTM(4, 4),
                nn.Linear(4, 4).requires_grad_(False),
                nn.Linear(4, 11),
            )
            self.twin = nn.Linear(4, 11)
            self.twin.weight = self.head.weight

        def forward(self, i):
            h, _ = self.lstm(self.embedding(i))
            return self.head(self.frozen(h)) + self.twin(h)

    model = Model()
    monitor = GradientMonitor(model, every=1)
    model(torch.tensor([[1], [2], [2]])).square().sum().backward()
    reading = monitor.step()
    whole = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    assert reading.norm == pytest.approx(nn.utils.get_total_norm(whole).item(), rel=1e-5)
    assert reading["embedding"].zeros == pytest.approx(9 / 11)
    assert reading["unused"].norm is reading["frozen"].norm is None
    assert reading["lstm"].activation_std > 0
    assert not reading.verdicts


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] = ()
    absent: int = dataclasses.field(init=False)


CONTAINERS = {
    "dict": lambda y: {"steps": 3, "state": y},
    "ordered dict that is a dataclass": lambda y: dataclasses.make_dataclass(
        "ModelOutput", ["state"], bases=(collections.OrderedDict,)
    )(y),
    "nested": lambda y: [torch.ones(3, dtype=torch.int64), [None, (y,)]],
    "dataclass": lambda y: Output(None, (y,)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_outputs_in_containers_are_read(container):
    class Wrapped(nn.Linear):
        def forward(self, x):
            out = CONTAINERS[container](super().forward(x))
            if isinstance(out, collections.OrderedDict):
                out["state"] = out.state
            return out

    model, x = Wrapped(4, 3), torch.randn(7, 4)
    monitor = GradientMonitor(model, every=1)
    model(x)
    nn.Linear.forward(model, x).square().sum().backward()
    layer = monitor.step()["Wrapped"]
    assert layer.activation_std == pytest.approx(
        nn.Linear.forward(model, x).std(correction=0).item(), rel=1e-5
    )


def ring(y):
    return (found := [None]).extend([found, found]) or found


@pytest.mark.parametrize(
    "output",
    [
        lambda y: None,
        lambda y: Output,
        ring,
        lambda y: y[:0],
        lambda y: y.detach().to_sparse_csr(),
        lambda y: torch.nested.as_nested_tensor([y[:3], y[3:]], layout=torch.jagged),
        lambda y: torch.nested.as_nested_tensor([y[:3], y[3:]]),
        lambda y: y.detach().to(torch.float8_e4m3fn),
        lambda y: torch.complex(y, y),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)
def test_an_output_without_statistics_is_left_out(output):
    class Odd(nn.Linear):
        def forward(self, x):
            return output(super().forward(x))

    model = Odd(4, 3)
    monitor = GradientMonitor(model, every=1)
    model(torch.randn(7, 4))
    model.weight.sum().backward()
    layer = monitor.step()["Odd"]
    assert layer.norm == pytest.approx(math.sqrt(12))
    assert layer.activation_std is None


def test_parameters_that_are_no_rows_of_the_output():
    """A linear layer that holds LoRA's two matrices beside its frozen weight."""

    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(16, 5)
            self.weight.requires_grad_(False)
            self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.zeros(5, 4))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    reading = watched(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Adapted()), steps=1)
    assert reading["2"].dead == 0
    assert reading["2"].zeros == pytest.approx(64 / 89)
    assert not reading.verdicts


# What is said


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
    """There the norms of all layers' gradients are equally small: ‖dW_l‖ = ‖δ_l‖ ‖a_{l-1}‖, one
    shrinks as the other grows."""
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
    assert "times the most of the past" in verdict.evidence


def test_an_update_larger_than_the_weights():
    verdicts = watched(network(), steps=2, rate=1e3).verdicts
    assert "exploding" in [v.kind for v in verdicts]
    assert any("as large as the weights" in v.evidence for v in verdicts)


@pytest.mark.parametrize("bias", [True, False])
def test_dead_layer(bias):
    """All of layer 2 is off. Without biases layer 4 gets no gradient either: its input is 0. The
    blame is layer 2's."""
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
            return (x * 0).sqrt() + x  # 0 forward, 0 · ∞ backward

    model = network()
    model[3] = Root()
    monitor = GradientMonitor(model, every=1, activations=activations)
    (verdict,) = train(model, monitor, 1)[-1].verdicts
    assert (verdict.kind, verdict.layer) == ("non-finite", "2")
    reading = monitor.history[-1]
    assert reading["2"].nonfinite > 0.9
    assert reading["4"].nonfinite == 0
    assert math.isnan(reading["2"].norm)


def test_a_bad_step_does_not_spoil_the_window():
    model = nn.Linear(3, 2)
    monitor = GradientMonitor(model, every=2, measure=2)
    for value in (math.inf, 1.0):
        model.zero_grad()
        model(torch.full((1, 3), value)).sum().backward()
        reading = monitor.step()
    assert reading.norm == pytest.approx(math.sqrt(8))
    assert reading["Linear"].nonfinite == pytest.approx(6 / 16)


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
def test_a_zero_that_is_right_is_no_trouble(last, dtype):
    """The sum of a normalised output is a constant: its gradient is zero, or rounding."""
    model = nn.Sequential(*network(nn.Tanh, depth=4), last()).to(dtype)
    x = torch.randn(32, 16, dtype=dtype)
    monitor = GradientMonitor(model, every=1)
    for _ in range(6):
        model.zero_grad()
        model(x).sum().backward()
        reading = monitor.step()
        assert reading["0"].norm < 0.1 * max(1.0, reading.norm)
        assert not reading.verdicts


def test_rounding_beneath_a_normalisation_is_not_called_dead_units():
    """Batch after batch another part of the units has a gradient that rounds to nothing."""
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


def test_silence_from_the_input_on():
    """Zeros in, through a module without parameters and a layer without a bias."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))
    monitor = GradientMonitor(model, every=1)
    cross_entropy(model(torch.zeros(9, 16)), torch.randint(0, 5, (9,))).backward()
    assert [v.layer for v in monitor.step().verdicts if v.kind == "dead units"] in (
        [],
        ["0"],
        ["1"],
    )


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


def test_copies_of_a_watched_model_are_not_watched():
    model = network()
    monitor = GradientMonitor(model, every=1)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for _ in range(2):
        x, y = batch()
        for m in (model, *copies):
            cross_entropy(m(x), y).backward()
        assert len(monitor._outputs.sums) == len(monitor.names)
        monitor.step()
    monitor.remove()
    with pytest.raises(RuntimeError, match=r"after remove\(\)"):
        monitor.step()


def test_transformations_of_a_watched_model_are_not_counted():
    model = network()
    monitor = GradientMonitor(model, every=1)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, y = batch()
    torch.vmap(
        torch.func.grad(lambda p, x, y: cross_entropy(torch.func.functional_call(model, p, x), y)),
        (None, 0, 0),
    )(parameters, x, y)
    assert not monitor._outputs.sums


def test_a_scaler_that_is_off_hides_nothing():
    model = network()
    monitor = GradientMonitor(
        model, every=2, measure=2, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    for factor in (math.inf, 1.0):
        model.zero_grad()
        x, y = batch()
        (cross_entropy(model(x), y) * factor).backward()
        reading = monitor.step()
    assert {v.kind for v in reading.verdicts} == {"non-finite"}


@pytest.mark.parametrize(
    ("activation", "normalise"),
    [(nn.ReLU, None), (nn.Tanh, None), (nn.GELU, nn.LayerNorm), (nn.Sigmoid, nn.BatchNorm1d)],
)
def test_healthy_networks_get_no_verdict(activation, normalise):
    """From the start until the loss is nearly nothing, where gradients have fallen by decades and
    rightly."""
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


def test_falls():
    assert falls([1.0, 0.1, 1e-3, 1e-3]) == pytest.approx([0, 1, 3, 3])
    assert falls([1.0, 1e-9, 1e-9]) == pytest.approx([0, 2, 2]), (
        "one step counts two decades at most"
    )
    assert falls([1e-9, 1.0, 0.0]) == pytest.approx([0, 0, 2])
    assert falls([0.0, 0.0]) == [0, 0]
    assert falls([]) == []


def test_every_verdict_has_a_cure():
    assert set(CURES) == {"vanishing", "exploding", "dead units", "non-finite"}
    assert judge(Reading(1, math.nan, None, (Layer("a"),)), []) == []


# Where it stands


def test_accumulation():
    """The gradient is the sum's, the activations are those of all passes."""
    model, (x, y) = network(), batch(32)
    monitor = GradientMonitor(model, every=1)
    cross_entropy(model(x), y).backward()
    whole = monitor.step()
    model.zero_grad()
    for part in range(4):
        (
            cross_entropy(model(x[part * 8 : part * 8 + 8]), y[part * 8 : part * 8 + 8]) / 4
        ).backward()
    parts = monitor.step()
    assert parts.norm == pytest.approx(whole.norm, rel=1e-5)
    for name in monitor.names:
        assert parts[name].activation_std == pytest.approx(whole[name].activation_std, rel=1e-5)


@pytest.mark.parametrize("unscale", [True, False])
def test_grad_scaler(unscale):
    """Gradients are measured without the scale, whoever takes it off."""
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monitor = GradientMonitor(model, every=1, scaler=scaler)
    for _ in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        true = nn.utils.get_total_norm(
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ).item()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        reading = monitor.step()
        scaler.step(optimizer)
        scaler.update()
        assert reading.norm == pytest.approx(true, rel=1e-5)
        assert not reading.verdicts


def test_a_step_that_the_scaler_skips_is_no_trouble_but_many_are():
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    monitor = GradientMonitor(model, every=4, measure=4, scaler=scaler)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(
            cross_entropy(model(x), y) * (math.inf if step in (1, 4, 5, 6, 7) else 1)
        ).backward()
        monitor.step()
        scaler.step(optimizer)
        scaler.update()
    assert [[v.kind for v in r.verdicts] for r in monitor.history] == [[], ["non-finite"]]


def test_compiled():
    model = network()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"torch\.compile leaves out hooks"):
        GradientMonitor(compiled, activations=True)
    monitor = GradientMonitor(compiled, every=1)
    reading = train(compiled, monitor, 2)[-1]
    assert monitor.names[0] == "0", "the names are those of the module inside"
    assert reading.norm == pytest.approx(
        nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), rel=1e-5
    )
    assert reading["0"].activation_std is None

    def step(x):
        return monitor.step()

    with pytest.raises(Exception, match="outside of what"):
        torch.compile(step, backend="eager", fullgraph=True)(torch.ones(1))


def test_a_compiled_function_around_the_model():
    """The monitor does not know of it: the hooks leave nothing behind where they are traced."""
    model = network()
    monitor = GradientMonitor(model, every=1)
    x, y = batch()
    step = torch.compile(lambda x, y: cross_entropy(model(x), y), backend="eager", fullgraph=True)
    step(x, y).backward()
    reading = monitor.step()
    assert reading.norm > 0
    assert reading["0"].activation_std is None


def test_wrappers_that_hide_the_gradients_are_refused():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        GradientMonitor(nn.DataParallel(network()))
    hidden = type("FullyShardedDataParallel", (nn.Module,), {})()
    hidden.part = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="fully_shard"):
        GradientMonitor(hidden)


def distributed(rank, folder, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        found = {}
        x, y = (t.chunk(2)[rank] for t in (torch.randn(12, 16), torch.randint(0, 5, (12,))))
        for kind in ("ddp", "fsdp2"):
            torch.manual_seed(0)
            model = network(width=16, depth=2)  # its head has 5 rows: shards of 3 and 2
            model[2].bias.data[:13] = -100
            if kind == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            torch.manual_seed(5)
            x, y = (t.chunk(2)[rank] for t in (torch.randn(12, 16), torch.randint(0, 5, (12,))))
            monitor = GradientMonitor(
                model, every=2, measure=2, writer=JSONLines(f"{folder}/{kind}.jsonl")
            )
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                reading = monitor.step()
                optimizer.step()
            layers = [
                [layer.norm, layer.mean, layer.std, layer.zeros, layer.dead, layer.update]
                for layer in reading.layers
            ]
            found[kind] = reading.norm, reading.update, layers, [str(v) for v in reading.verdicts]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_ddp_and_fsdp2_read_what_one_process_reads(tmp_path):
    """After the all-reduce, on shards that are not even, alike on every rank; written once."""
    torch.multiprocessing.spawn(distributed, (str(tmp_path), None), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model = network(width=16, depth=2)
    model[2].bias.data[:13] = -100
    torch.manual_seed(5)
    x, y = torch.randn(12, 16), torch.randint(0, 5, (12,))
    monitor = GradientMonitor(model, every=2, measure=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        reading = monitor.step()
        optimizer.step()
    for kind in ("ddp", "fsdp2"):
        assert ranks[0][kind] == ranks[1][kind]
        norm, update, layers, verdicts = ranks[0][kind]
        assert norm == pytest.approx(reading.norm, rel=1e-5)
        assert update == pytest.approx(reading.update, rel=1e-5)
        for mine, layer in zip(layers, reading.layers, strict=True):
            one = [layer.norm, layer.mean, layer.std, layer.zeros, layer.dead, layer.update]
            assert [v is None for v in mine] == [v is None for v in one]
            assert [v for v in mine if v is not None] == pytest.approx(
                [v for v in one if v is not None], rel=1e-4, abs=1e-7
            )
        assert (
            [v.partition(":")[0] for v in verdicts]
            == [str(v).partition(":")[0] for v in reading.verdicts]
            == ["dead units in '2'"]
        )
        assert len((tmp_path / f"{kind}.jsonl").read_text().splitlines()) == 1


# What it writes


def test_json_lines(tmp_path):
    model = network()
    model[2].weight.data[0, 0] = math.nan
    monitor = GradientMonitor(model, every=1, writer=JSONLines(tmp_path / "all.jsonl", layers=True))
    train(model, monitor, 2)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["norm"] is None
    assert lines[0]["2/nonfinite"] > 0
    assert lines[0]["verdicts"][0]["layer"] == "2"
    assert lines[0]["verdicts"][0]["cure"] == CURES["non-finite"]
    JSONLines(tmp_path / "totals.jsonl").write(monitor.history[0])
    assert set(json.loads((tmp_path / "totals.jsonl").read_text())) == {"step", "norm", "verdicts"}


def test_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)

    written = []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == str(tmp_path)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_text(self, name, text, step):
            written.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    model = network()
    model[2].bias.data.fill_(-100)
    train(model, GradientMonitor(model, every=1, writer=TensorBoard(tmp_path, layers=True)), 1)
    assert {
        ("gradients/norm", 1),
        ("gradients/4/norm", 1),
        ("gradients/1/activation_zeros", 1),
        ("gradients/verdicts", 1),
    } <= set(written)


def test_heat_map(tmp_path, monkeypatch):
    from matplotlib.image import imread

    model = network()
    monitor = GradientMonitor(model, every=1)
    with pytest.raises(ValueError, match="nothing has been read yet"):
        monitor.heat_map(tmp_path / "map.png")
    train(model, monitor, 4)
    steps, names, table = monitor.norms()
    assert (steps, names) == ([1, 2, 3, 4], ["0", "2", "4", "6"])
    assert table[1][3] == monitor.history[3]["2"].norm
    monitor.heat_map(tmp_path / "map.png")
    assert imread(tmp_path / "map.png").std() > 0.05
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        monitor.heat_map(tmp_path / "map.png")


def test_prints():
    model = network()
    reading = watched(model, 2)
    assert str(reading).startswith("step 2: gradient norm ")
    assert len(reading.table().splitlines()) == 1 + len(reading.layers)
    with pytest.raises(KeyError, match="no layer 'x'; there are: 0, 1"):
        reading["x"]


def test_a_checkpoint_goes_on_to_the_same_readings(tmp_path):
    def monitors(model):
        return GradientMonitor(model, every=4, measure=4, updates=False)

    torch.manual_seed(2)
    model = network()
    whole = monitors(model)
    copy = monitors(model)
    for step in range(8):
        if step == 6:
            torch.save(copy.state_dict(), tmp_path / "monitor.pt")
            copy.remove()
            copy = monitors(model)
            copy.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        model.zero_grad()
        x, y = batch()
        cross_entropy(model(x), y).backward()
        whole.step()
        copy.step()
    assert list(copy.history) == list(whole.history)
    assert len(copy.history) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "1 <= measure <= every"),
        ({"every": 2, "measure": 3}, ValueError, "measure=3, every=2"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        GradientMonitor(network(), **options)


def test_bad_models():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        GradientMonitor([])
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        GradientMonitor(nn.ReLU())
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    monitor = GradientMonitor(model, every=1, activations=False, updates=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"several devices \(cpu, meta\)"):
        monitor.step()
