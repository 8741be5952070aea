"""The monitor measures what torch computes, and counts and changes nothing else."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import pickle

import pytest
import torch
from monitor_helpers import batch, hooks_of, network, train, watched
from torch import nn
from torch.nn.functional import cross_entropy

from custom_backprop.monitor import (
    GradientMonitor,
)


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
        z = x
        for module in model:
            z = module(z)  # not a call of the model, but the modules' hooks see it
            if module is model[1]:
                outputs.append(z.detach().double().flatten())
        cross_entropy(z, y).backward()
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
    """The square of 1e-30 is too small for float32."""
    model = nn.Linear(3, 2)
    monitor = GradientMonitor(model, every=1)
    (model(torch.ones(1, 3)).sum() * 1e-30).backward()
    assert monitor.step().norm == pytest.approx(math.sqrt(8) * 1e-30, rel=1e-5, abs=0)


def test_a_bad_step_does_not_spoil_the_window():
    model = nn.Linear(3, 2)
    monitor = GradientMonitor(model, every=2, measure=2)
    for value in (math.inf, 1.0):
        model.zero_grad()
        model(torch.full((1, 3), value)).sum().backward()
        reading = monitor.step()
    assert reading.norm == pytest.approx(math.sqrt(8))
    assert reading["Linear"].nonfinite == pytest.approx(6 / 16)


def test_windows_and_hooks():
    """The last step of a window is measured, and others at equal distances before it. Only these
    have hooks."""
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


def deviation_of(module, x):
    with torch.no_grad():
        return pytest.approx(module(x).std(correction=0).item(), rel=1e-5)


def test_copies_of_a_watched_model_are_not_watched():
    model = network()
    monitor = GradientMonitor(model, every=1)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for _ in range(2):
        x, y = batch()
        cross_entropy(model(x), y).backward()
        for m in copies:
            cross_entropy(m(100 * x), y).backward()
        assert monitor.step()["0"].activation_std == deviation_of(model[0], x)
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
    )(parameters, 100 * x, y)
    cross_entropy(model(x), y).backward()
    assert monitor.step()["0"].activation_std == deviation_of(model[0], x)


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
    """A linear layer with LoRA's two matrices next to its frozen weight."""

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
