"""Activations beyond what the op database drives: extreme values, kinks, in place, layouts, dtypes
and bad calls, all against stock."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_backprop import convert, functional, use_backend
from custom_backprop.backends import BACKENDS, why_not
from custom_backprop.testing import Make, database
from custom_backprop.testing.checks.compare import sliced, transposed
from custom_backprop.testing.strategies import tensors, views

INF, NAN = float("inf"), float("nan")
SPECS = [s for s in database().values() if s.family == "activation"]
HERE = [b for b in BACKENDS if why_not(b, DEVICE) is None]

#: every activation with every set of arguments that its spec meets
CALLS = [
    pytest.param(spec, kwargs, id=" ".join([spec.name, *map(str, kwargs.values())]))
    for spec in SPECS
    for kwargs in {str(s.kwargs): s.kwargs for s in spec.samples(Make())}.values()
]

#: those whose function can write over its input
IN_PLACE = [c for c in CALLS if "inplace" in inspect.signature(c.values[0].function).parameters]


def stock(spec):
    """Stock's own function, where the spec's oracle is another."""
    return getattr(F, spec.name, spec.reference)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("hardtanh", (-0.4, 0.7)),
        ("threshold", (0.4, 0.1)),
        ("softshrink", (0.4,)),
        ("hardshrink", (0.4,)),
    ],
)
def test_a_bound_that_float32_does_not_hold(name, parameters, backend):
    """Of float64, exactly at the bound and next to it. triton before 3.9 compares with the bound
    rounded to float32."""
    bounds = torch.tensor([-0.7, -0.4, 0.4, 0.7], dtype=torch.float64, device=DEVICE)
    x = torch.cat([bounds, bounds.nextafter(bounds * 2), bounds.nextafter(bounds * 0)])
    for ours, theirs in zip(
        *(
            value_and_gradient(lambda v, m=m: getattr(m, name)(v, *parameters), x, {})
            for m in (functional, F)
        ),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def significant_strides(t):
    """Those of the dimensions that have more than one element, if there is an element."""
    return [stride for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1 and t.numel()]


def value_and_gradient(function, x, kwargs, dy=None):
    """In the strides of x, for dy or 0.75 everywhere."""
    x = x.detach().requires_grad_()
    y = function(x, **kwargs)
    return y.detach(), *torch.autograd.grad(y, x, torch.full_like(y, 0.75) if dy is None else dy)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("spec", "kwargs"), CALLS)
def test_extreme_values(spec, kwargs, dtype, backend):
    """As near to the float64 truth as stock in the same dtype, and infinite or NaN just where the
    truth is."""
    far = [1e-3, 3.0, 10.0, 20.5, 30.0, 50.0, 88.8, 100.0, 1e4, INF]
    x = torch.tensor([-f for f in far] + [0.0, *far, NAN], dtype=dtype, device=DEVICE)
    truth = value_and_gradient(spec.reference, x.double(), kwargs)
    ours, theirs = (value_and_gradient(f, x, kwargs) for f in (spec.function, stock(spec)))
    if spec.name == "softsign":  # autograd gives inf / inf = NaN; the limit is 0
        truth[1][x.isinf()] = 0
    if spec.name == "hardswish":  # as does the oracle on a GPU
        truth[1][x.isinf()] = (x[x.isinf()] > 0).double()
    if (
        spec.name == "gelu" and backend == "aten" and ours[0][x == INF].isnan()
    ):  # stock's own: test_gelu_at_infinity
        below = x != INF
        x, ours, theirs, truth = (
            x[below],
            *([v[below] for v in pair] for pair in (ours, theirs, truth)),
        )
    if spec.name in (
        "relu6",
        "hardtanh",
        "hardsigmoid",
        "hardswish",
    ):  # stock's vector and scalar code differ at NaN: the gradient is dy or 0
        x, ours, theirs, truth = x[:-1], *([v[:-1] for v in pair] for pair in (ours, theirs, truth))
    for our, their, true, what in zip(ours, theirs, truth, ("value", "gradient"), strict=True):
        true = true.to(dtype).double()
        error, allowed = (
            (our.double() - true).abs(),
            (their.double() - true).abs().nan_to_num(0, posinf=0),
        )
        good = (
            (our == true)
            | (our.isnan() & true.isnan())
            | (error <= allowed + 4 * torch.finfo(dtype).eps * true.abs().clamp_min(1))
        )
        assert good.all(), (
            f"{what} at {x[~good].tolist()}: {our[~good].tolist()}, true {true[~good].tolist()}"
        )


def test_celu_with_a_negative_alpha(backend):
    """e^(x/α) grows there without bound."""
    x = torch.tensor([-INF, -200, -1, -0.3, -1e-9, 0, 1, INF], dtype=torch.float64, device=DEVICE)
    ours, theirs = (value_and_gradient(m.celu, x, {"alpha": -0.5}) for m in (functional, F))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(("spec", "kwargs"), CALLS)
def test_second_derivatives_at_kinks(spec, kwargs, backend):
    """There too ours is stock's choice, and a second derivative that is 0 everywhere can be asked
    for."""
    x = torch.tensor(
        [-3, -1.2, -1, -0.5, -0.0, 0, 0.1, 0.5, 1, 1.2, 1.5, 3, 6, 20],
        dtype=torch.float64,
        device=DEVICE,
    )
    weights = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64, device=DEVICE)
    results = []
    for function in (spec.function, spec.reference):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(leaf, **kwargs), leaf, weights, create_graph=True)
        results.append(torch.autograd.grad(dx, leaf, weights)[0])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "kwargs"), CALLS)
def test_kinks(spec, kwargs, dtype, backend):
    """Where no derivative exists, ours is stock's choice."""
    near = [
        v
        for k in (-3, -1.2, -1, -0.5, 0, 0.1, 0.5, 1, 1.2, 1.5, 3, 6)
        for v in (k - 1 / 16, k, k + 1 / 16)
    ]
    x = torch.tensor([*near, -0.0], dtype=torch.float64, device=DEVICE)
    if dtype == torch.bfloat16:
        # stock rounds a parameter such as 1.2 to bfloat16, ours does not: only what bfloat16 holds
        # is a kink of both
        x = x[x.bfloat16() == x]
    x = x.to(dtype)
    ours, theirs = (value_and_gradient(f, x, kwargs) for f in (spec.function, stock(spec)))
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_at_infinity(dtype, backend):
    """Infinity. By ATen what stock gives, which is NaN where oneDNN computes it with AVX-512
    (pytorch issue 185770)."""
    x = torch.full((3,), INF, dtype=dtype, device=DEVICE)
    y, stocks = functional.gelu(x.requires_grad_()), F.gelu(x)
    assert (y == INF).all() or (backend == "aten" and y.isnan().all() and stocks.isnan().all())


def test_stocks_hardsigmoid_gradient_is_one_sixth_in_float32(backend):
    """ATen/native/cpu/Activation.cpp holds 1/6 as a float in every dtype (torch 2.13), so the
    spec's oracle is relu6(x + 3) / 6."""
    x = torch.zeros((), dtype=torch.float64, device=DEVICE)
    ours, theirs = (
        value_and_gradient(f, x, {}, torch.ones_like(x))[1].item()
        for f in (functional.hardsigmoid, F.hardsigmoid)
    )
    assert ours == 1 / 6
    if DEVICE == "cpu":
        assert theirs == torch.tensor(1 / 6).item() != 1 / 6


@pytest.mark.parametrize(("spec", "kwargs"), IN_PLACE)
class TestInPlace:
    def test_gradients_are_stocks(self, spec, kwargs, backend):
        base = torch.randn(5, 7, dtype=torch.float64, device=DEVICE)
        weight = torch.randn_like(base)
        found = []
        for function, options in ((spec.function, {"inplace": True}), (spec.reference, {})):
            leaf = base.clone().requires_grad_()
            x = leaf * 1
            y = function(x, **kwargs, **options)
            assert (y is x) == bool(options)
            (dx,) = torch.autograd.grad((y**3 * weight).sum(), leaf, create_graph=True)
            found.append((y, dx, *torch.autograd.grad((dx * weight).sum(), leaf)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_on_a_view_and_on_strides(self, spec, kwargs, backend):
        base = torch.randn(4, 6, dtype=torch.float64, device=DEVICE)
        weight = torch.randn(6, 4, dtype=torch.float64, device=DEVICE)
        found = []
        for in_place in (True, False):
            leaf = base.clone().requires_grad_()
            whole = (leaf * 1).t()
            view = whole[1::2]
            if in_place:
                spec.function(view, **kwargs, inplace=True)
            else:
                view.copy_(spec.reference(view.clone(), **kwargs))
            (dx,) = torch.autograd.grad((whole * weight).sum(), leaf)
            found.append((whole, dx))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_a_leaf_is_refused_untouched(self, spec, kwargs, backend):
        leaf = torch.randn(4, device=DEVICE, requires_grad=True)
        before = leaf.detach().clone()
        for target, what in ((leaf, "a leaf"), (leaf[1:], "a view of a leaf")):
            for function in (spec.function, stock(spec)):
                with pytest.raises(RuntimeError, match=f"^{what} Variable that requires grad"):
                    function(target, **kwargs, inplace=True)
        assert torch.equal(leaf, before)
        with torch.no_grad():
            assert spec.function(leaf, **kwargs, inplace=True) is leaf
        assert leaf.requires_grad
        assert torch.equal(leaf.detach(), spec.function(before, **kwargs))

    def test_integers_are_written_where_stock_writes_them(self, spec, kwargs, backend):
        x = torch.tensor([-2, 0, 3], device=DEVICE)
        expected = x.clone()
        try:
            stock(spec)(expected, **kwargs, inplace=True)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                spec.function(x, **kwargs, inplace=True)
        else:
            assert spec.function(x, **kwargs, inplace=True) is x
        assert torch.equal(x, expected)

    def test_the_version_moves(self, spec, kwargs, backend):
        x = torch.randn(4, device=DEVICE)
        before = x._version
        spec.function(x, **kwargs, inplace=True)
        assert x._version > before
        leaf = torch.randn(4, device=DEVICE, requires_grad=True)
        x = leaf * 1
        y = x * x  # saves x
        spec.function(x, **kwargs, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_in_inference_mode(self, spec, kwargs, backend):
        with torch.inference_mode():
            x = torch.randn(4, device=DEVICE)
            expected = spec.function(x, **kwargs)
            assert torch.equal(spec.function(x, **kwargs, inplace=True), expected)

    def test_under_a_transform(self, spec, kwargs, backend):
        x = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)

        def in_place(v):
            return spec.function(v * 1, **kwargs, inplace=True).sum()

        expected = torch.vmap(torch.func.grad(lambda v: spec.function(v, **kwargs).sum()))(x)
        torch.testing.assert_close(torch.vmap(torch.func.grad(in_place))(x), expected)
        torch.testing.assert_close(
            torch.func.jvp(in_place, (x[0],), (x[1],))[1], (expected[0] * x[1]).sum()
        )

    def test_the_module_honours_it(self, spec, kwargs, backend):
        module = spec.module[0]
        x = torch.randn(5, device=DEVICE)
        expected = module(**kwargs)(x)
        assert module(**kwargs, inplace=True)(x) is x
        assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "copies"),
    [
        ("relu", {}, 0),
        ("leaky_relu", {}, 0),
        ("leaky_relu", {"negative_slope": -1.0}, 1),
        ("threshold", {"threshold": 1.0, "value": 1.0}, 0),
        ("silu", {}, 1),
    ],
)
def test_in_place_keeps_a_copy_only_where_backward_needs_the_input(name, kwargs, copies, backend):
    x = torch.randn(5, device=DEVICE, requires_grad=True) * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        getattr(functional, name)(x, **kwargs, inplace=True)
    assert len(kept) == 1
    assert (kept[0] != x.data_ptr()) == copies


@pytest.mark.parametrize("name", [n for n in functional.__all__ if n.endswith("_")])
def test_underscored_names_write_in_place(name, backend):
    arguments = (0.1, 2.0) if name == "threshold_" else ()
    x = torch.randn(5, device=DEVICE)
    expected = getattr(F, name)(x.clone(), *arguments)
    assert getattr(functional, name)(x, *arguments) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_other_dtypes_do_as_stock(spec, dtype, backend):
    """An integer or complex tensor gives stock's result and gradient, or stock's error."""
    kwargs = next(iter(spec.samples(Make()))).kwargs
    x = torch.tensor([-2, 0, 3], device=DEVICE).to(dtype).requires_grad_(dtype.is_complex)
    try:
        expected = stock(spec)(x, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            spec.function(x, **kwargs)
        return
    result = spec.function(x, **kwargs)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)
    if dtype.is_complex:
        torch.testing.assert_close(
            *(torch.autograd.grad(y.abs().sum(), x)[0] for y in (result, expected))
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(
    "function", ["relu", "gelu", "silu", "relu in place", "softmax", "linear", "linear_activation"]
)
def test_rows_of_several_lengths_do_as_stock(function, layout, backend):
    rows, weight = (
        [torch.randn(2, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)],
        torch.randn(5, 4, device=DEVICE),
    )
    calls = {
        "relu in place": lambda module, x: module.relu(x + x, inplace=True),
        "softmax": lambda module, x: module.softmax(x, -1),
        "linear": lambda module, x: module.linear(x, weight),
        "linear_activation": lambda module, x: (
            module.linear_activation(x, weight)
            if module is functional
            else module.relu(module.linear(x, weight))
        ),
    }
    results = []
    for module in (functional, F):
        x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
        y = calls.get(function, lambda module, x: getattr(module, function)(x))(
            module, x
        ).to_padded_tensor(0.0)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0].to_padded_tensor(0.0)))
    torch.testing.assert_close(*results)


LAYOUTS = {
    "transposed": transposed(torch.randn(3, 4)),
    "sliced": sliced(torch.randn(3, 4)),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "3-D permuted": torch.randn(2, 3, 4).permute(1, 2, 0),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 2, 1, 5).to(memory_format=torch.channels_last_3d),
    "offset": torch.randn(14)[1:-1].view(3, 4),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("spec", "kwargs"), CALLS)
def test_strides_are_stocks(spec, kwargs, x, backend):
    x = x.to(DEVICE)
    dy = transposed(torch.randn(x.shape, device=DEVICE))
    ours, theirs = (value_and_gradient(f, x, kwargs, dy) for f in (spec.function, spec.reference))
    if (
        spec.name != "logsigmoid"
    ):  # stock's makes its input contiguous; ours keeps the strides as all others do
        assert ours[0].stride() == theirs[0].stride()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("name", ["relu", "elu", "silu"])
def test_sizes_at_the_edges_of_a_block(name, size, backend):
    """The last element counts, and in place nothing past it is written."""
    buffer = torch.randn(size + 64, dtype=torch.float64, device=DEVICE)
    after = buffer[size:].clone()
    dy = torch.randn(size, dtype=torch.float64, device=DEVICE)
    ours, theirs = (
        value_and_gradient(getattr(m, name), buffer[:size], {}, dy) for m in (functional, F)
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-11)
    getattr(functional, name)(buffer[:size], inplace=True)
    torch.testing.assert_close(buffer, torch.cat([theirs[0], after]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend_", HERE)
@pytest.mark.parametrize(
    ("name", "kwargs", "special"),
    [
        ("leaky_relu", {"negative_slope": -0.3}, (0.0, INF, -INF, NAN)),
        ("sigmoid", {}, (50, -50)),
        ("softplus", {"beta": 2.0, "threshold": 3.0}, (1.5, -400, 400)),
        ("gelu", {}, (40, -40)),
        ("hardtanh", {}, (1.0, -1.0, INF)),
        ("hardtanh", {"min_val": 0.5, "max_val": 0.5}, (0.5,)),
    ],
)
def test_any_shape_layout_and_value(name, kwargs, special, backend_):
    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        x = data.draw(tensors(special=special)).to(DEVICE)
        dy = data.draw(views(x.shape)).holding(
            torch.linspace(-2, 1, x.numel(), dtype=x.dtype).view(x.shape).to(DEVICE)
        )
        ours, theirs = (
            value_and_gradient(getattr(m, name), x, kwargs, dy) for m in (functional, F)
        )
        assert significant_strides(ours[0]) == significant_strides(theirs[0])
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-11, equal_nan=True)

    with use_backend(backend_):
        check()


X = torch.ones(3)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("hardtanh", (X, 1.0, -1.0), {}),
        ("hardtanh", (X, "a", 1.0), {}),
        ("softshrink", (X, -1.0), {}),
        ("softshrink", (X, "a"), {}),
        ("celu", (X, 0.0), {}),
        ("celu", (X, "a"), {}),
        ("celu", (X,), {"alpha": 0, "inplace": True}),
        ("gelu", (X,), {"approximate": "no"}),
        ("gelu", (X,), {"approximate": 3}),
        ("hardshrink", (X, "a"), {}),
        ("leaky_relu", (X, "a"), {}),
        ("leaky_relu", (X, None), {"inplace": True}),
        ("elu", (X, 1j), {}),
        ("softplus", (X, "a"), {}),
        ("threshold", (X,), {}),
        ("threshold", (X, 1.0), {}),
        ("threshold_", (X.clone(), None, 1.0), {}),
        ("relu", (X,), {"slope": 1.0}),
        ("relu", (3.0,), {}),
        ("relu", (), {}),
        ("silu", ([1.0, 2.0],), {}),
        ("elu", (None,), {"inplace": True}),
        ("relu_", (X.expand(2, 3),), {}),
        ("silu", (X.expand(2, 3),), {"inplace": True}),
    ],
)
def test_bad_calls_raise_what_stock_raises(name, args, kwargs, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the type is what is compared
        getattr(F, name)(*args, **kwargs)
    with pytest.raises(expected.type):
        getattr(functional, name)(*args, **kwargs)


def test_small_gradients_keep_their_digits(backend):
    """tanhshrink' is about x² near 0: a tanh that is only as exact as its largest value would lose
    it."""
    x = torch.logspace(-4, 0, 9, dtype=torch.float32, device=DEVICE).requires_grad_()
    (grad,) = torch.autograd.grad(functional.tanhshrink(x), x, torch.ones_like(x))
    torch.testing.assert_close(
        grad.double(), x.detach().double().tanh().square(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("module", [torch.nn.ReLU6, torch.nn.Hardtanh])
@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_that_torch_lets_change_in_place(module, inplace):
    """MobileNet's order, where dropout follows in place: torch keeps the input of these two, so
    that what follows may write over their output."""

    class Doubled(torch.nn.Module):
        def forward(self, x):
            return x.mul_(2)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), module(inplace=inplace), Doubled())
    x, found = torch.randn(3, 4), []
    for of in (model, convert(copy.deepcopy(model))):
        of(x).square().sum().backward()
        found.append(of[0].weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["relu", "gelu", "softplus"])
def test_compiled_in_the_strides_that_the_fake_promises(name, backend):
    """The gradient comes transposed."""
    x, w = torch.randn(4, 6, device=DEVICE, requires_grad=True), torch.randn(24, device=DEVICE)

    def run(module):
        return (getattr(module, name)(x.sin()).t().reshape(-1) * w).sum()

    torch._dynamo.reset()
    (ours,) = torch.autograd.grad(torch.compile(run, backend="aot_eager")(functional), x)
    torch.testing.assert_close(ours, *torch.autograd.grad(run(F), x))


def test_a_parameter_that_wants_a_gradient_is_refused():
    """As by torch: none would reach it."""
    for module in (functional, F):
        with pytest.raises(TypeError, match=r"must be (a )?Number"):
            module.leaky_relu(torch.ones(3), torch.tensor(0.1, requires_grad=True))
