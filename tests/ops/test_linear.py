"""The linear layers beyond what the op database drives: shapes at the edges of tiles, frozen
weights, what is saved, bad calls, modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch.nn.utils import parametrizations, prune

from custom_backprop import functional, nn
from custom_backprop.backends.kernels import kernels
from custom_backprop.formulas.activation import ACTIVATIONS
from custom_backprop.testing.checks.compare import sliced, transposed
from custom_backprop.testing.specs.linear import linear_activation as stock_linear_activation

PARAMETERS = {
    "threshold": {"threshold": 0.1, "value": 0.5},
    "hardtanh": {"min_val": -0.5, "max_val": 0.7},
    "elu": {"alpha": 0.6},
}


def tensor(*shape, dtype=torch.float64, requires_grad=True):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)


def assert_same(ours, theirs, inputs, **tolerance):
    """Values, and gradients under random weights."""
    y, expected = ours(*inputs), theirs(*inputs)
    assert y.dtype == expected.dtype
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **tolerance)
    dy = torch.randn_like(expected)
    leaves = [t for t in inputs if t is not None]
    grads, expected_grads = (torch.autograd.grad(r, leaves, dy) for r in (y, expected))
    for g, e, leaf in zip(grads, expected_grads, leaves, strict=True):
        assert g.shape == leaf.shape
        assert g.dtype == leaf.dtype
        torch.testing.assert_close(g, e, **tolerance)


def stock_relu_squared(x, weight, bias):
    return torch.relu(F.linear(x, weight, bias)).square()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_by_name(activation, backend):
    parameters = PARAMETERS.get(activation, {})

    def ours(x, weight, bias):
        return functional.linear_activation(x, weight, bias, activation, **parameters)

    def theirs(x, weight, bias):
        return stock_linear_activation(x, weight, bias, activation, **parameters)

    inputs = tensor(7, 5), tensor(3, 5), tensor(3)
    # 1e-7: stock's hardsigmoid gradient multiplies by 1/6 in float32; on a GPU the rest of it, and
    # hardswish, do as well
    inexact = ("hardsigmoid", "hardswish") if DEVICE == "cuda" else ("hardsigmoid",)
    tolerance = {"rtol": 1e-7, "atol": 1e-7} if activation in inexact else {}
    assert_same(
        ours, stock_relu_squared if activation == "relu_squared" else theirs, inputs, **tolerance
    )


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(31, 32, 33), (33, 31, 32), (32, 33, 31), (65, 130, 70), (1, 1, 1), (64, 16, 64), (257, 3, 5)],
)
@pytest.mark.parametrize(
    "layout", [torch.clone, transposed, sliced], ids=["contiguous", "transposed", "sliced"]
)
def test_tiles(rows, inner, columns, layout, backend):
    inputs = [
        layout(t.detach()).requires_grad_()
        for t in (tensor(rows, inner), tensor(columns, inner), tensor(columns))
    ]
    assert_same(functional.linear, F.linear, inputs)
    assert_same(
        lambda *a: functional.linear_activation(*a, "softplus", beta=2.0),
        lambda *a: stock_linear_activation(*a, "softplus", beta=2.0),
        inputs,
    )


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((0, 4), (3, 4), (3,)),
        ((2, 0), (3, 0), (3,)),
        ((2, 4), (0, 4), (0,)),
        ((0, 0), (0, 0), (0,)),
        ((0,), (3, 0), (3,)),
        ((2, 0, 4), (3, 4), None),
        ((2, 3, 1, 2, 4), (3, 4), (3,)),
        ((2, 3, 4), (4,), None),
        ((4,), (4,), None),
    ],
    ids=str,
)
def test_awkward_shapes(x, weight, bias, backend):
    """Without features in, y = b; without rows, dW = 0."""
    inputs = [tensor(*x), tensor(*weight), None if bias is None else tensor(*bias)]
    assert_same(functional.linear, F.linear, inputs)
    if len(weight) == 2:
        assert_same(
            lambda *a: functional.linear_activation(*a, "tanh"),
            lambda *a: stock_linear_activation(*a, "tanh"),
            inputs,
        )


@pytest.mark.parametrize(
    ("frozen", "products", "sums"),
    [((), 2, 1), ((0,), 1, 1), ((1,), 1, 1), ((1, 2), 1, 0), ((0, 1), 0, 1), ((0, 2), 1, 0)],
)
@pytest.mark.parametrize("op", ["linear", "linear_activation"])
def test_nothing_is_computed_for_a_frozen_input(op, frozen, products, sums, backend):
    """A peer computed the weight's gradient for frozen weights too: a third of backward's time."""
    inputs = [
        t.requires_grad_(i not in frozen)
        for i, t in enumerate((tensor(4, 5), tensor(3, 5), tensor(3)))
    ]
    y = getattr(functional, op)(*inputs)
    launched = []
    launch = kernels("launch")
    with (
        launch.observed(
            lambda kernel, programs, args, constexprs, options: launched.append(
                (kernel.__name__, constexprs)
            )
        ),
        torch.autograd.profiler.profile() as profile,
    ):
        y.backward(torch.randn_like(y))
    if backend == "triton":
        assert [name for name, _ in launched].count("_product") == products
        columns = [c for name, c in launched if name == "_columns"]
        assert sum(c["NEED_BIAS"] for c in columns) == sums
        assert len(columns) == (sums if op == "linear" else 1)
    by_aten = sum(
        e.name in ("aten::mm", "aten::addmm", "aten::bmm") for e in profile.function_events
    )
    assert by_aten == (0 if backend == "triton" else products)
    for i, t in enumerate(inputs):
        assert (t.grad is None) == (i in frozen)


def saved_by(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function()
    return y, kept


def same_memory(a, b):
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


@pytest.mark.parametrize(
    ("frozen", "keeps"), [((), "xw"), ((0,), "x"), ((1,), "w"), ((0, 1), ""), ((1, 2), "w")]
)
def test_what_linear_saves(frozen, keeps, backend):
    """The input only for dW, the weight only for dx."""
    x, weight, bias = (
        t.requires_grad_(i not in frozen)
        for i, t in enumerate((tensor(4, 5), tensor(3, 5), tensor(3)))
    )
    _, kept = saved_by(lambda: functional.linear(x, weight, bias))
    assert len(kept) == len(keeps)
    for name, t in (("x", x), ("w", weight)):
        assert any(same_memory(k, t) for k in kept) == (name in keeps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_activation_keeps_z_only_where_the_derivative_needs_it(activation, backend):
    parameters = PARAMETERS.get(activation, {})
    inputs = tensor(4, 5), tensor(3, 5), tensor(3)
    y, kept = saved_by(lambda: functional.linear_activation(*inputs, activation, **parameters))
    assert len(kept) == (3 if ACTIVATIONS[activation].saves_output else 4)
    own = [k for k in kept if not any(same_memory(k, t) for t in inputs)]
    if ACTIVATIONS[activation].saves_output:
        assert same_memory(own[0], y)
    else:
        torch.testing.assert_close(own[0], F.linear(*inputs))


@pytest.mark.parametrize("op", ["linear", "linear_activation"])
def test_dtypes_under_autocast(op, backend):
    x, weight, bias = (tensor(*s, dtype=torch.float32) for s in ((4, 5), (3, 5), (3,)))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = getattr(functional, op)(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    for t in (x, weight, bias):
        assert t.grad.dtype == torch.float32
        assert t.grad.count_nonzero()


def test_precision_is_torchs_setting(monkeypatch):
    precision = kernels("matmul").precision
    before = torch.get_float32_matmul_precision()
    try:
        for name, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(name)
            assert precision() == expected
        for allow, expected in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allow
            assert precision() == expected
        for name in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = name
            assert precision() == name
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)


X, W, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)


@pytest.mark.parametrize(
    "args",
    [
        (X, torch.ones(4, 2), B),
        (X, W, torch.ones(3)),
        (X, W.double(), B),
        (X, W, B.double()),
        (torch.tensor(1.0), W, B),
        (X, torch.ones(3), torch.ones(1)),
        (X, torch.ones(4), None),
        (X, torch.ones(4, 3, 1), B),
        (X, torch.tensor(1.0), None),
        (X, W, torch.ones(4, device="meta")),
        (X, W.long(), None),
        ([1.0], W, B),
        (X, None, None),
        (X, W, 3.0),
        (X,),
    ],
    ids=lambda args: ", ".join(str(getattr(a, "shape", a)) for a in args).replace("torch.Size", ""),
)
def test_bad_calls_raise_what_stock_raises(args, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the type is what is compared
        F.linear(*args)
    with pytest.raises(expected.type):
        functional.linear(*args)


def test_bad_activations(backend):
    with pytest.raises(ValueError, match=r"no activation 'rleu': choose one of relu, "):
        functional.linear_activation(X, W, B, "rleu")
    for call in (
        {"alpha": 1.0},
        {"activation": "threshold", "value": 1.0},
        {"activation": "elu", "alpha": "one"},
    ):
        with pytest.raises(TypeError):
            functional.linear_activation(X, W, B, **call)
        with pytest.raises(TypeError):
            nn.LinearActivation(3, 4, **call)
    with pytest.raises(ValueError, match="no activation"):
        nn.LinearActivation(3, 4, activation="none")


class TestModule:
    @pytest.fixture
    def module(self):
        return nn.LinearActivation(
            5, 3, activation="elu", alpha=0.7, dtype=torch.float64, device=DEVICE
        )

    def test_repr(self, module):
        arguments = "in_features=5, out_features=3, bias=True, activation='elu', alpha=0.7"
        assert repr(module) == f"LinearActivation({arguments})"

    def test_checkpoints_go_both_ways(self, module, backend):
        stock = torch.nn.Linear(5, 3, dtype=torch.float64, device=DEVICE)
        assert list(module.state_dict()) == list(stock.state_dict())
        module.load_state_dict(stock.state_dict())
        x = tensor(4, 5)
        torch.testing.assert_close(module(x), F.elu(stock(x), 0.7))
        stock.load_state_dict(module.state_dict())

    def test_copies(self, module, backend):
        x = tensor(4, 5)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), module(x))
            assert other.weight is not module.weight

    def test_initialisation_is_stocks(self, module):
        torch.manual_seed(3)
        mine = nn.LinearActivation(5, 3)
        torch.manual_seed(3)
        assert torch.equal(mine.weight, torch.nn.Linear(5, 3).weight)

    def test_on_meta(self):
        module = nn.LinearActivation(5, 3, device="meta")
        y = module(torch.empty(2, 5, device="meta"))
        assert y.shape == (2, 3)
        y.sum().backward()
        assert module.weight.grad.shape == (3, 5)

    def test_weight_norm_and_pruning(self, module, backend):
        stock = torch.nn.Linear(5, 3, dtype=torch.float64, device=DEVICE)
        stock.load_state_dict(module.state_dict())
        x = tensor(4, 5)
        for layer in (module, stock):
            prune.random_unstructured(layer, "bias", amount=1)
            torch.manual_seed(1)
            prune.l1_unstructured(layer, "weight", amount=4)
            prune.remove(layer, "weight")
            parametrizations.weight_norm(layer)
        module.bias_mask.copy_(stock.bias_mask)
        y, expected = module(x), F.elu(stock(x), 0.7)
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip(*([*m.parameters()] for m in (module, stock)), strict=True):
            torch.testing.assert_close(
                torch.autograd.grad(y.sum(), ours, retain_graph=True),
                torch.autograd.grad(expected.sum(), theirs, retain_graph=True),
            )


@pytest.mark.parametrize("shape", [(), (1, 5), (3, 5), (3, 1)])
def test_a_bias_that_broadcasts(shape, backend):
    args = [
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for s in ((3, 4), (5, 4), shape)
    ]
    dy = torch.randn(3, 5, dtype=torch.float64, device=DEVICE)
    ours, theirs = (
        torch.autograd.grad(m.linear(*args), args, dy) for m in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(ours, theirs)


def test_complex_numbers_are_left_to_stock(backend):
    x, weight, bias = (
        torch.randn(s, dtype=torch.complex64, device=DEVICE, requires_grad=True)
        for s in ((3, 4), (5, 4), (5,))
    )
    results = []
    for ours in (True, False):
        y = functional.linear(x, weight, bias) if ours else F.linear(x, weight, bias)
        z = (
            functional.linear_activation(x, weight, bias, "tanh")
            if ours
            else torch.tanh(F.linear(x, weight, bias))
        )
        results.append(
            (y, z, *torch.autograd.grad(y.abs().sum() + z.abs().sum(), (x, weight, bias)))
        )
    torch.testing.assert_close(*results)


def test_the_tangent_of_a_bias_alone_has_the_shape_of_the_output():
    x, weight, bias = tensor(2, 3, 4), tensor(5, 4), tensor(5)
    t = torch.randn_like(bias)
    for function in (functional.linear, F.linear):
        _, found = torch.func.jvp(lambda b, f=function: f(x, weight, b), (bias,), (t,))
        torch.testing.assert_close(found, t.expand(2, 3, 5))


def test_an_output_with_leading_dimensions_may_be_changed_in_place(backend):
    """Of such an input, and with a bias, torch's own product is a view."""
    x, weight, bias = tensor(2, 3, 4), tensor(5, 4), tensor(5)
    expected = torch.autograd.grad(F.linear(x, weight, bias).relu().sum(), (x, weight, bias))
    y = functional.linear(x, weight, bias).relu_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, weight, bias)), expected)
    functional.linear_activation(x, weight, bias, "gelu").mul_(2)
