"""What is refused, with stock's type of exception and the shapes, dtypes or names in the message;
and extreme values that every path must bear."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional

INF, NAN = math.inf, math.nan


def outcome(function, *args, **kwargs):
    """The shape of the result, or the type of the exception."""
    try:
        return function(*args, **kwargs).shape
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("bias", [(), (1,), (5,), (2,), (1, 5), (2, 5), (1, 1), (3,), (1, 1, 1, 5)])
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (4, 2, 3)])
def test_biases_of_any_shape(shape, bias, backend):
    """One of fewer elements is broadcast to the output; none makes the output larger."""
    x, w, b = (torch.randn(s, device=DEVICE) for s in (shape, (5, 3), bias))
    stock = outcome(F.linear, x, w, b)
    assert outcome(functional.linear, x, w, b) == stock
    if isinstance(stock, torch.Size):
        torch.testing.assert_close(functional.linear(x, w, b), F.linear(x, w, b))


def test_integers_in_linear_are_stocks(backend):
    x, w = torch.arange(6).view(2, 3), torch.arange(12).view(4, 3)
    assert torch.equal(functional.linear(x, w), F.linear(x, w))


X, CLASSES = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.cross_entropy(X, None), "target"),
        (lambda m: m.cross_entropy(X, CLASSES, ignore_index=0.5), "ignore_index"),
        (lambda m: m.nll_loss(X, CLASSES, ignore_index=0.5), "ignore_index"),
        (lambda m: m.poisson_nll_loss(X, X, eps="x"), "poisson_nll_loss"),
        (lambda m: m.smooth_l1_loss(X, X, beta="x"), None),
        (lambda m: m.softmax(X, dim="a"), "softmax.*dim|dim.*softmax"),
        (lambda m: m.log_softmax(X, dim=1.5), "log_softmax.*dim|dim.*log_softmax"),
        (lambda m: m.relu([1.0]), "relu"),
        (lambda m: m.prelu(X, 0.1), "prelu"),
        (lambda m: m.softmax(X, 1, dtype="float32"), "softmax: dtype"),
        (lambda m: m.layer_norm(X, (3,), "w"), "layer_norm: weight"),
        (lambda m: m.rms_norm(X, (3,), 1.0), "rms_norm: weight"),
        (lambda m: m.batch_norm(X, "mean", None, training=True), "batch_norm: running_mean"),
        (lambda m: m.group_norm(X, 3, None, 1.0), "group_norm: bias"),
        (lambda m: m.cross_entropy(X, CLASSES, "w"), "cross_entropy: weight"),
        (lambda m: m.binary_cross_entropy_with_logits(X, X, "w"), "weight"),
        (lambda m: m.kl_div(X, None, reduction="sum"), "kl_div: target"),
        (lambda m: m.poisson_nll_loss(X, "t"), "poisson_nll_loss: target"),
        (lambda m: m.scaled_dot_product_attention(X, X, X, scale="c"), "attention"),
    ],
)
def test_type_errors_name_the_op_and_the_argument(call, match):
    with pytest.raises(TypeError):
        call(F)
    with pytest.raises(TypeError, match=match):
        call(functional)


def test_the_classes_in_the_last_dimension_are_hinted_at():
    x, t = torch.randn(2, 7, 5), torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        F.cross_entropy(x, t)
    with pytest.raises(RuntimeError, match="transpose"):
        functional.cross_entropy(x, t)


@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sure_and_right_or_wrong_logit(dtype, weight, backend):
    """bce_with_logits at infinite logits: 0 or infinite, as stock where stock is no NaN."""
    x = torch.tensor([INF, INF, -INF, -INF, 200.0, -200.0], dtype=dtype, device=DEVICE)
    t = torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=dtype, device=DEVICE)
    w = None if weight is None else torch.full_like(x, weight)
    for options in ({}, {"weight": w}):
        loss = functional.binary_cross_entropy_with_logits(x, t, reduction="none", **options)
        stock = F.binary_cross_entropy_with_logits(x, t, reduction="none", **options)
        known = ~stock.isnan()
        torch.testing.assert_close(loss[known], stock[known])
        assert loss[0] == INF


@pytest.mark.parametrize("x", [-3.4e38, -1e38, 1e38, 3.4e38])
def test_mish_far_out(x, backend):
    found = []
    for module in (functional, F):
        leaf = torch.tensor([x], device=DEVICE, requires_grad=True)
        y = module.mish(leaf)
        found.append((y, *torch.autograd.grad(y, leaf)))
    torch.testing.assert_close(*found)


def test_hardsigmoid_has_the_slope_0_at_nan(backend):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([NAN, 1.0], dtype=dtype, device=DEVICE, requires_grad=True)
        (dx,) = torch.autograd.grad(functional.hardsigmoid(x).sum(), x)
        assert dx[0] == 0


@pytest.mark.parametrize("d", [1e19, 1.8e38, 3e38])
def test_mse_of_large_differences(d, backend):
    """The gradient of a mean is finite where stock's is: 2 d overflows, 2 d / n does not."""
    found = []
    for module in (functional, F):
        x = torch.full((4096,), d, device=DEVICE, requires_grad=True)
        y = module.mse_loss(x, torch.zeros_like(x))
        found.append((y, *torch.autograd.grad(y, x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ignored_rows_have_no_gradient_even_of_nan(dtype, backend):
    """Of a loss for each row, whose gradients are NaN: as stock, which reads no ignored row."""
    x = torch.randn(6, 40, device=DEVICE).to(dtype)
    t = torch.tensor([1, -100, 3, -100, 5, 6], device=DEVICE)
    found = []
    for module in (functional, F):
        leaf = x.clone().requires_grad_()
        y = module.cross_entropy(leaf, t, reduction="none")
        (dx,) = torch.autograd.grad(y, leaf, torch.full_like(y, NAN))
        found.append(dx)
    ours, stock = found
    assert (ours[1] == 0).all()
    assert (ours[3] == 0).all()
    assert torch.equal(ours.isnan(), stock.isnan())


TWO_CLASSES = torch.tensor([0, 1], device=DEVICE)

#: function -> the rest of its arguments after an input (2, 4), made by a function of a shape
OF_ONE_DTYPE = {
    "linear": lambda t: (t(3, 4),),
    "linear_activation": lambda t: (t(3, 4), None, "relu"),
    "swiglu_mlp": lambda t: (t(3, 4), t(3, 4), t(4, 3)),
    "scaled_dot_product_attention": lambda t: (t(3, 4), t(3, 4)),
    "linear_cross_entropy": lambda t: (t(3, 4), TWO_CLASSES),
    "prelu": lambda t: (t(4),),
    "cross_entropy": lambda t: (TWO_CLASSES, t(4).abs()),
}


@pytest.mark.parametrize("name", OF_ONE_DTYPE)
def test_dtypes_that_differ(name, backend):
    """Autocast makes one of float32 and bfloat16, and leaves float64, as stock's does."""

    def given(dtype):
        return OF_ONE_DTYPE[name](lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype))

    function, x = getattr(functional, name), torch.randn(2, 4, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x, *given(dtype))
    with torch.autocast(DEVICE, torch.bfloat16):
        function(x, *given(torch.bfloat16))
        with pytest.raises(RuntimeError, match="dtype"):
            function(x.double(), *given(torch.float32))
        with pytest.raises(RuntimeError, match="dtype"):
            function(x, *given(torch.float64))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given(torch.bfloat16)]
    with pytest.raises(RuntimeError, match="dtype"):
        function(x.to("meta"), *meta)
