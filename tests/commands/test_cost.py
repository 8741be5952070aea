"""The cost of a step, against counts by hand and against torch's own counter."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import custom_backprop
from benchmarks import growth
from custom_backprop.__main__ import main
from custom_backprop.cli import cost as command
from custom_backprop.conversions.convert import DROP_INS
from custom_backprop.cost import Layer, cost, measure, operators
from custom_backprop.cost.report import LOSS, MODEL, OUTSIDE
from custom_backprop.testing import cases, database
from custom_backprop.testing.case import outputs

B, IN, HIDDEN, OUT, FLOAT = 5, 7, 11, 3, 8


def mlp(*activation):
    return nn.Sequential(
        nn.Linear(IN, HIDDEN), *(activation or [nn.ReLU()]), nn.Linear(HIDDEN, OUT)
    ).double()


def batch(requires_grad=False):
    return torch.rand(B, IN, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_small_network_counted_by_hand(requires_grad):
    report = cost(mlp(), batch(requires_grad))
    first, last = 2 * B * IN * HIDDEN, 2 * B * HIDDEN * OUT
    for side in (report.stock, report.ours):
        assert [side[n].forward_flops for n in "012"] == [first, 0, last]
        assert [side[n].backward_flops for n in "012"] == [first * (1 + requires_grad), 0, 2 * last]
        assert [side[n].parameters for n in "012"] == [(IN + 1) * HIDDEN, 0, (HIDDEN + 1) * OUT]
        assert [side[n].saved_bytes for n in "012"] == [B * IN * FLOAT, B * HIDDEN * FLOAT, 0], (
            "x, and y of the ReLU once"
        )
        assert side["1"].forward_bytes == 2 * B * HIDDEN * FLOAT
        assert side["1"].backward_bytes == 3 * B * HIDDEN * FLOAT
        assert side["0"].forward_bytes == (B * IN + IN * HIDDEN + HIDDEN + B * HIDDEN) * FLOAT
        gradients = B * HIDDEN + B * IN + HIDDEN * IN, B * HIDDEN + HIDDEN  # dW = dyᵀ x, db = Σ dy
        dx = (B * HIDDEN + HIDDEN * IN + B * IN) * requires_grad
        assert side["0"].backward_bytes == (sum(gradients) + dx) * FLOAT
        total = side.total
        assert (total.forward_flops, total.saved_bytes) == (first + last, B * (IN + HIDDEN) * FLOAT)


def test_a_linear_layer_and_its_activation_in_one_save_y_once():
    ours = custom_backprop.nn
    for activation, stock, outputs_saved in (
        ("relu", nn.ReLU(), 1),
        ("sigmoid", nn.Sigmoid(), 1),
        ("gelu", nn.GELU(), 2),
    ):
        fused = nn.Sequential(
            ours.LinearActivation(IN, HIDDEN, activation=activation), ours.Linear(HIDDEN, OUT)
        ).double()
        found = measure(fused, batch())
        assert (
            found["0"].saved_bytes
            == B * (IN + outputs_saved * HIDDEN) * FLOAT - (outputs_saved - 1) * B * HIDDEN * FLOAT
        )
        assert (
            found.total.saved_bytes
            == measure(mlp(stock), batch()).total.saved_bytes
            == B * (IN + outputs_saved * HIDDEN) * FLOAT
        )


ACTIVATIONS = [
    t
    for t, o in DROP_INS.items()
    if o.__module__.endswith("nn.activation") and t is not nn.Threshold
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda t: t.__name__)
def test_no_activation_of_ours_saves_more_than_stocks(activation):
    report = cost(mlp(activation()), batch())
    of_input = (
        B * HIDDEN * FLOAT if activation is nn.Tanhshrink else 0
    )  # saves tanh x, as stock does, instead of computing it again
    assert 0 < report.ours.total.saved_bytes <= report.stock.total.saved_bytes + of_input


class Forked(nn.Module):
    """Two layers use one result, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(IN, IN).double() for _ in range(3))

    def forward(self, x):
        y = self.a(x)
        return (self.c(self.b(y) * y + self.c(y))).sum()


def test_backward_belongs_to_the_layer_whose_forward_made_it():
    product = 2 * B * IN * IN
    report = cost(Forked(), batch())
    for side in (report.stock, report.ours):
        assert [side[n].forward_flops for n in "abc"] == [product, product, 2 * product]
        assert [side[n].backward_flops for n in "abc"] == [product, 2 * product, 4 * product]
        assert side["c"].parameters == (IN + 1) * IN, "counted once"
        assert side[MODEL].backward_bytes > 0
        assert side[OUTSIDE] == Layer(OUTSIDE)


class Total(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.rand(IN, dtype=torch.float64))

    def forward(self, x):
        return self.p.sum() + x.sum()


def test_a_gradient_that_is_copied_into_a_parameter_belongs_to_its_layer():
    found = measure(nn.Sequential(Total()), batch())
    assert found["0"].backward_bytes == (1 + IN) * FLOAT, "one number, expanded, then copied"
    assert found[OUTSIDE].backward_bytes == 0


def test_a_shared_parameter_is_counted_once():
    model = nn.Sequential(nn.Linear(IN, IN, bias=False), nn.Linear(IN, IN, bias=False)).double()
    model[1].weight = model[0].weight
    assert measure(model, batch()).total.parameters == IN * IN


class Squared(nn.Module):
    def forward(self, x):
        return x * x


def test_an_operator_reads_a_tensor_once():
    found = measure(nn.Sequential(nn.Linear(IN, HIDDEN).double(), Squared()), batch())
    assert found["1"].forward_bytes == 2 * B * HIDDEN * FLOAT


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant, self.body, self.last = reentrant, mlp(), nn.Linear(OUT, OUT).double()

    def forward(self, x):
        return self.last(
            self.body(x)
            if self.reentrant is None
            else checkpoint(self.body, x, use_reentrant=self.reentrant)
        )


def test_a_checkpoint_trades_saved_bytes_for_a_second_forward():
    plain, again = measure(Checkpointed(), batch()), measure(Checkpointed(False), batch())
    for name in ("body.0", "body.2", "last"):
        assert again[name].forward_flops == plain[name].forward_flops > 0
    assert (
        again["body.0"].backward_flops
        == plain["body.0"].backward_flops + plain["body.0"].forward_flops
    )
    assert again["body.2"].backward_flops == plain["body.2"].backward_flops, (
        "nobody needs its result again"
    )
    assert again["last"] == plain["last"]
    assert plain.total.saved_bytes - again.total.saved_bytes == B * HIDDEN * FLOAT


def test_the_graph_of_a_reentrant_checkpoint_belongs_to_no_layer():
    x = batch(requires_grad=True)
    plain, again = measure(Checkpointed(), x), measure(Checkpointed(True), x)
    bodies = [plain[name] for name in ("body.0", "body.2")]
    assert again[OUTSIDE].backward_flops == sum(layer.backward_flops for layer in bodies)
    assert again.total.backward_flops == plain.total.backward_flops + sum(
        layer.forward_flops for layer in bodies
    )


class Looks(nn.Module):
    def forward(self, x):
        torch.empty_like(x).new_empty(3)
        return (
            x.t().reshape(-1).view(IN, B).unsqueeze(0).expand(4, -1, -1).detach().requires_grad_()
        )


def test_a_view_moves_nothing_and_an_expanded_dimension_is_one_element():
    assert measure(Looks(), batch()).total.forward_bytes == 2 * B * IN * FLOAT, (
        "reshape copies, the rest looks"
    )
    found = measure(nn.Sequential(Looks(), nn.Sigmoid()), batch())
    assert found["1"].forward_bytes == (1 + 4) * B * IN * FLOAT


class Filled(nn.Module):
    def forward(self, x):
        y = torch.empty_like(x).fill_(1)
        torch.mul(x, 2, out=y)
        return torch.zeros_like(x, requires_grad=True)


def test_an_output_that_is_only_written_is_not_read():
    assert measure(Filled(), batch()).total.forward_bytes == (1 + 2 + 1) * B * IN * FLOAT


def test_a_composite_operator_counts_as_one():
    for device in ("cpu", "meta"):
        report = cost(mlp(nn.SiLU()).to(device), batch().to(device))
        assert (
            report.stock["1"].backward_bytes
            == report.ours["1"].backward_bytes
            == 3 * B * HIDDEN * FLOAT
        )


def test_a_tensor_changed_in_place_is_read_and_written():
    found = measure(nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(inplace=True)).double(), batch())
    assert found["1"].forward_bytes == 2 * B * HIDDEN * FLOAT


def test_parameters_and_buffers_are_not_saved_bytes():
    layers = nn.Sequential(nn.Linear(IN, IN), nn.BatchNorm1d(IN)).double().eval()
    found = measure(layers, batch(requires_grad=True))
    assert found["0"].saved_bytes == found["1"].saved_bytes == B * IN * FLOAT


def test_a_loss_that_is_a_module_has_a_row_and_a_function_has_none():
    x, t = batch(), torch.rand(B, OUT, dtype=torch.float64)
    by_module = measure(mlp(), x, loss=nn.MSELoss(), targets=[t])
    by_function = measure(mlp(), x, loss=lambda y: nn.functional.mse_loss(y, t))
    assert by_module[LOSS].saved_bytes == by_function[OUTSIDE].saved_bytes == 2 * B * OUT * FLOAT
    assert by_module[OUTSIDE].forward_bytes == 0
    assert by_module.total.backward_bytes == by_function.total.backward_bytes


def counted_by_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("backend", ["aten", "formula"])
@pytest.mark.parametrize("ours", [False, True])
def test_torchs_counter_counts_the_same(ours, backend):
    activation = custom_backprop.nn.LinearActivation(OUT, 4, activation="gelu")
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.Linear(IN - 1, OUT),
        nn.Softmax(-1),
        *[activation] * ours,
        nn.Flatten(),
    )
    if ours:
        custom_backprop.convert(model)
    x = torch.rand(B, 2, IN)
    with custom_backprop.use_backend(backend):
        total = measure(model, x).total
        assert (total.forward_flops, total.backward_flops) == counted_by_torch(model, x)
    assert total.forward_flops > 0


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", database())
def test_a_primitive_has_the_flops_of_what_aten_runs_in_its_place(name, monkeypatch):
    spec = database()[name]

    class Call(nn.Module):
        def forward(self, *leaves):
            return outputs(case.call(*leaves))

    def flops():
        total = measure(Call(), *case.leaves).total
        return total.forward_flops, total.backward_flops

    for case in cases(spec):
        # torch's counter does not know products with a vector
        if max(a.dim() for a in case.leaves) > 1:
            beneath = flops()
            with monkeypatch.context() as patched:
                patched.setattr(operators, "_beneath", lambda func, args: None)
                assert flops() == beneath, f"{case.name}: see flops= in its primitive"


def test_meta_tensors_cost_the_same():
    x = torch.rand(B, IN, dtype=torch.float64)
    real, meta = (cost(mlp().to(d), x.to(d)) for d in ("cpu", "meta"))
    assert meta.stock == real.stock
    assert meta.ours["0"].backward_flops == real.ours["0"].backward_flops
    assert meta.ours.total.saved_bytes == real.ours.total.saved_bytes
    gradients = B * HIDDEN + B * IN + HIDDEN * IN + HIDDEN
    assert meta.ours["0"].backward_bytes == gradients * FLOAT, "one operator reads dy once"


def test_the_model_stays_as_it_is():
    model, x = nn.Sequential(mlp(), nn.BatchNorm1d(OUT).double()), batch(requires_grad=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch"}


def test_models_that_cannot_be_measured():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        cost(lambda x: x, batch())
    with pytest.raises(ValueError, match="no output requires grad"):
        cost(nn.ReLU(), batch())


def test_the_command(tmp_path, capsys):
    file = tmp_path / "f.json"
    assert main(["cost", "digits", "--batch", "4", "--device", "cpu", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["device"] == "cpu"
    for side in ("stock", "ours"):
        assert found[side]["total"]["forward_flops"] == 2 * 4 * (64 * 256 + 256 * 128 + 128 * 10)
        assert (
            found[side]["total"]["parameters"] == 64 * 256 + 256 * 128 + 128 * 10 + 256 + 128 + 10
        )
        assert [layer["kind"] for layer in found[side]["layers"]][-2:] == ["CrossEntropyLoss", ""]
    assert f"wrote {file}" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("2 "))
    assert row == ["2", "Linear", "32.9k", "262k", "262k", "524k", "524k", *row[7:]]
    assert "(outside)" not in out, "a row without a figure"


@pytest.mark.parametrize("name", command.EXAMPLES)
def test_the_examples_of_the_command_have_losses_and_batches(name, capsys):
    assert main(["cost", name, "--batch", "2", "--device", "meta"]) == 0
    assert f"{name} on meta" in capsys.readouterr().out


def test_the_examples_of_the_command_are_the_examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    assert repr(importlib.import_module("digits").stock_model(256, 128)) == repr(
        command.digits()[0]
    )
    for theirs, ours in (
        (importlib.import_module("autoencoder").Autoencoder(2, 64), command.autoencoder()[0]),
        (
            importlib.import_module("vanishing_gradients").network(
                "sigmoid", "Kaiming", 20, torch.rand(2, 64)
            ),
            command.vanishing_gradients()[0],
        ),
    ):
        assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]


MODULE = """
import torch
def net(batch=3):
    return torch.nn.Linear(2, 5), torch.ones(batch, 2)
def large():
    return torch.nn.Linear(2**20, 2**20), torch.ones(1, 2**20)
def fixed():
    return torch.nn.Linear(2, 5), [torch.ones(3, 2)], torch.nn.MSELoss(), torch.ones(3, 5)
def bare():
    return torch.nn.Linear(2, 5)
def flat():
    return torch.nn.ReLU(), torch.ones(3, 2)
number = 7
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "built_for_cost.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "flops"),
    [("net", [], 60), ("net", ["--batch", "4"], 80), ("fixed", [], 60)],
)
def test_a_callable_of_the_user(module, name, options, flops, tmp_path):
    assert (
        main(
            [
                "cost",
                f"built_for_cost:{name}",
                "--device",
                "cpu",
                "--json",
                str(tmp_path / "f.json"),
                *options,
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "f.json").read_text())["ours"]["total"]["forward_flops"] == flops


def test_a_model_larger_than_the_memory(module, capsys):
    assert main(["cost", "built_for_cost:large", "--device", "meta"]) == 0
    assert "1.1T" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digtis"], "no example 'digtis'; there are digits,"),
        (["no_such_module:net"], "cannot import no_such_module: No module named 'no_such_module'"),
        (["built_for_cost:nett"], "built_for_cost has no 'nett'"),
        (["built_for_cost:number"], "built_for_cost:number is not callable"),
        (["built_for_cost:bare"], "built_for_cost:bare must return (model, inputs)"),
        (["built_for_cost:flat"], "built_for_cost:flat: nothing to differentiate"),
        (
            ["built_for_cost:fixed", "--batch", "4"],
            "cannot call built_for_cost:fixed: got an unexpected keyword argument 'batch'",
        ),
        (["digits", "--batch", "0"], "0 is less than 1"),
        (["digits", "--device", "nowhere"], "no device 'nowhere'"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, module, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["cost", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_slope_is_that_of_the_upper_half():
    sizes = [1, 2, 4, 8, 16, 32]
    assert growth.slope(sizes, [5, 5, 5, *(3 * n**2 for n in sizes[3:])]) == pytest.approx(
        2, abs=1e-12
    )
    assert growth.slope(sizes, [7.0] * 6) == pytest.approx(0, abs=1e-12)
    noisy = growth.slope([1, 1, 10, 100], [9, 9, 10, 1000])
    assert noisy == pytest.approx(2, abs=1e-12)
