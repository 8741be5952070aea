"""One line swaps the layers of a model; nothing else of it changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

import custom_backprop
from custom_backprop import nn
from custom_backprop.conversions.convert import DROP_INS


def model():
    torch.manual_seed(0)
    stock = torch.nn
    block = stock.Sequential(
        stock.Linear(6, 8), stock.GELU(approximate="tanh"), stock.Dropout(0.0), stock.LayerNorm(8)
    )
    return stock.Sequential(
        block, stock.LeakyReLU(0.3), stock.Linear(8, 3, bias=False), stock.Softmax(dim=-1)
    ).double()


def test_every_drop_in_is_known():
    assert {DROP_INS[getattr(torch.nn, n)] for n in nn.__all__ if hasattr(torch.nn, n)} == set(
        DROP_INS.values()
    )
    assert all(issubclass(ours, stock) for stock, ours in DROP_INS.items())
    assert DROP_INS[torch.nn.Linear] is nn.Linear


def test_classes_change_and_nothing_else():
    stock, ours = model(), model()
    parameters, calls = list(ours.parameters()), []
    ours[2].register_forward_hook(lambda *_: calls.append(1))
    assert custom_backprop.convert(ours, fusions=False) is ours
    assert [type(m) for m in ours] == [torch.nn.Sequential, nn.LeakyReLU, nn.Linear, nn.Softmax]
    assert type(ours[0][3]) is torch.nn.LayerNorm or type(ours[0][3]) in DROP_INS.values()
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    outputs = []
    for m in (stock, ours):
        y = m(x)
        (y * w).sum().backward()
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()]
    )
    assert calls == [1]


def test_there_and_back():
    m = model()
    before = [type(c) for c in m.modules()]
    custom_backprop.revert(custom_backprop.convert(m))
    assert [type(c) for c in m.modules()] == before


def test_the_model_may_be_one_layer_and_may_be_copied():
    layer = custom_backprop.convert(torch.nn.Linear(2, 3))
    assert type(copy.deepcopy(layer)) is nn.Linear


def test_subclasses_keep_their_forward():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    m = torch.nn.Sequential(Doubled(2, 2), parametrizations.weight_norm(torch.nn.Linear(2, 2)))
    types = [type(c) for c in m]
    assert [type(c) for c in custom_backprop.convert(m)] == types


def test_a_layer_of_our_own_stays_when_torch_has_none():
    m = torch.nn.Sequential(nn.LinearActivation(2, 2), nn.ReLU())
    assert [type(c) for c in custom_backprop.revert(m)] == [nn.LinearActivation, torch.nn.ReLU]


def test_an_optimizer_made_before_goes_on():
    m = torch.nn.Sequential(torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    custom_backprop.convert(m)
    before = m[0].weight.detach().clone()
    m(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(m[0].weight, before)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got list"):
        custom_backprop.convert([torch.nn.Linear(2, 2)])


def test_a_subclass_of_a_converted_class_is_copied_as_itself():
    m = custom_backprop.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    assert type(m) is not torch.nn.Sequential
    m.__class__ = type("Derived", (type(m),), {})
    assert type(copy.deepcopy(m)) is type(m)


def test_a_converted_model_is_traced_by_fx():
    layers = (
        torch.nn.Linear(4, 4),
        torch.nn.ReLU(inplace=True),
        torch.nn.PReLU(),
        torch.nn.GELU(),
        torch.nn.Softmax(dim=-1),
    )
    model, x = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)), torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    traced = torch.fx.symbolic_trace(custom_backprop.convert(model))
    found = dict(
        zip(
            dict(traced.named_parameters()),
            torch.autograd.grad(traced(x).square().sum(), list(traced.parameters())),
            strict=True,
        )
    )
    torch.testing.assert_close(
        [found[name] for name, _ in model.named_parameters()], list(expected)
    )
    assert {n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"} >= {
        "linear",
        "activate_",
        "prelu",
        "gelu",
        "softmax",
    }


def test_types_that_override_torchs_functions_hear_of_ours():
    heard = []

    class Listening(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            heard.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs)

    x = torch.randn(3, 4).as_subclass(Listening)
    y = custom_backprop.functional.linear(custom_backprop.functional.relu(x), torch.randn(2, 4))
    assert type(y) is Listening
    assert {"relu", "linear"} <= set(heard)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_goes_by_the_exact_class_says_revert_first():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = model(x)
    custom_backprop.convert(model)
    with pytest.raises(RuntimeError, match=r"custom_backprop.revert\(model\) first"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"custom_backprop.revert\(model\) first"):
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    custom_backprop.revert(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert "quantized" in type(quantized[0]).__module__


def kinds(model):
    return [type(m) for m in model.modules()][1:]


@pytest.mark.parametrize(
    ("rules", "swapped"),
    [
        ({"include": "0.*"}, ["0.0", "0.1", "0.2", "0.3"]),
        ({"include": torch.nn.Linear}, ["0.0", "2"]),
        ({"include": lambda name, module: name == "3"}, ["3"]),
        ({"include": ["1", torch.nn.Softmax]}, ["1", "3"]),
        ({"exclude": "0*"}, ["1", "2", "3"]),
        ({"exclude": (torch.nn.Linear, "*.2")}, ["0.1", "0.3", "1", "3"]),
        ({"include": torch.nn.Linear, "exclude": "2"}, ["0.0"]),
    ],
)
def test_rules_choose(rules, swapped):
    m = custom_backprop.convert(model(), **rules)
    assert [n for n, c in m.named_modules() if type(c) in DROP_INS.values()] == swapped
    excluded = {x.name for x in custom_backprop.conversion_report(m).left}
    assert excluded == {"0.0", "0.1", "0.2", "0.3", "1", "2", "3"} - set(swapped)


def test_a_module_with_two_names_is_excluded_by_either():
    layer = torch.nn.Linear(2, 2)
    m = torch.nn.ModuleDict({"a": layer, "b": layer})
    assert type(custom_backprop.convert(m, exclude="b")["a"]) is torch.nn.Linear


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("layers.*", ValueError, r"include='layers\.\*' fits no module"),
        (torch.nn.Conv2d, ValueError, r"Conv2d.* fits no module"),
        (3, TypeError, r"include takes patterns .* got int"),
        (torch.nn.ReLU(), TypeError, r"got ReLU"),
        ([None], TypeError, r"got NoneType"),
    ],
)
def test_rules_that_say_nothing(rule, error, words):
    m = model()
    with pytest.raises(error, match=words):
        custom_backprop.convert(m, include=rule)
    assert kinds(m) == kinds(model())


def test_a_dry_run_changes_nothing(capsys):
    m, stock = model(), model()
    assert custom_backprop.convert(m, exclude="2", dry_run=True) is m
    assert kinds(m) == kinds(stock)
    assert vars(m).keys() == vars(stock).keys()
    printed = capsys.readouterr().out
    assert "left: excluded" in printed
    assert "-> custom_backprop.Softmax" in printed


def test_what_loses_is_left_unless_it_is_named():
    m = torch.nn.Sequential(torch.nn.Dropout2d(), torch.nn.Dropout())
    (left,) = custom_backprop.conversion_report(custom_backprop.convert(m)).left
    assert (left.name, left.reason) == ("0", "loses on this device (cpu): 0.62x")
    assert kinds(custom_backprop.convert(m, include="*")) == [nn.Dropout2d, nn.Dropout]


def test_a_class_of_the_users(monkeypatch):
    class Theirs(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    class Ours(Theirs):
        def forward(self, x):
            return x + x

    monkeypatch.delitem(DROP_INS, Theirs, raising=False)  # gone at the end
    register = custom_backprop.register_conversion
    register(Theirs, Ours)
    register(Theirs, Ours)
    m = custom_backprop.convert(torch.nn.Sequential(Theirs()))
    assert type(m[0]) is Ours
    assert type(custom_backprop.revert(m)[0]) is Theirs
    with pytest.raises(ValueError, match="Linear has a counterpart already: Linear"):
        register(torch.nn.Linear, type("Mine", (torch.nn.Linear,), {}))
    with pytest.raises(TypeError, match="expected a subclass of Theirs"):
        register(Theirs, torch.nn.Linear)
    with pytest.raises(TypeError, match=r"torch.nn.Module, got <class 'int'>"):
        register(int, Ours)
    del DROP_INS[Theirs]


def test_left_and_why():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    replaced = torch.nn.ReLU()
    replaced.forward = lambda x: x
    m = torch.nn.Sequential(Doubled(2, 2), replaced, torch.nn.Conv1d(1, 1, 1))
    left = custom_backprop.conversion_report(custom_backprop.convert(m)).left
    assert [x.reason for x in left] == [
        "a subclass of Linear with a forward of its own",
        "its forward was replaced",
        "no counterpart here",
    ]
