"""The two faces of a Function, and what stands above autograd: autocast and the cheap way where
nothing wants a gradient."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils._python_dispatch
import torch.utils.flop_counter
from conftest import DEVICE
from torch.autograd import forward_ad

from custom_backprop import functional, use_backend
from custom_backprop.extend import differentiable


def counting(**policies):
    """An op 3 x that counts its backward passes and remembers the dtype that it met."""
    seen = {"backward": 0, "dtype": None}

    @differentiable(**policies)
    class Triple:
        """y = 3 x."""

        @staticmethod
        def forward(x, extra=None):
            seen["dtype"] = x.dtype
            return 3 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.count = len(inputs)

        @staticmethod
        def backward(ctx, dy):
            seen["backward"] += 1
            return 3 * dy, *(None,) * (ctx.count - 1)

        @staticmethod
        def jvp(ctx, tangent, *_):
            return 3 * tangent

    return Triple, seen


def test_the_op_keeps_its_name_and_docstring():
    op, _ = counting()
    assert op.__name__ == "Triple"
    assert op.__doc__ == "y = 3 x."
    x = torch.randn(2, requires_grad=True)
    assert op(x).grad_fn.name().startswith("Triple")


def test_no_function_is_recorded_where_nothing_wants_a_gradient():
    op, _ = counting()
    assert op(torch.randn(2)).grad_fn is None
    x = torch.randn(2, requires_grad=True)
    with torch.no_grad():
        assert op(x).grad_fn is None
    with torch.inference_mode():
        assert op(torch.randn(2)).grad_fn is None
    assert op(x).grad_fn is not None


def test_forward_mode_and_transforms_take_the_other_face():
    op, _ = counting()
    x, t = torch.randn(3), torch.randn(3)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, 3 * t)
    torch.testing.assert_close(torch.func.jvp(op, (x,), (t,))[1], 3 * t)
    torch.testing.assert_close(torch.vmap(op)(x), 3 * x)
    torch.testing.assert_close(torch.vmap(torch.func.grad(op))(x), torch.full((3,), 3.0))


def test_forward_over_reverse():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64)
    ours, stock = (
        torch.autograd.functional.vhp(lambda v, f=f: (f(v) * w).sum(), x, t)[1]
        for f in (functional.silu, torch.nn.functional.silu)
    )
    torch.testing.assert_close(ours, stock)


def test_autocast_casts_once_above_autograd():
    for policy, given, met in (
        ("lower", torch.float32, torch.bfloat16),
        ("lower", torch.float64, torch.float64),
        ("float32", torch.bfloat16, torch.float32),
        ("float32", torch.float64, torch.float64),
        (None, torch.float32, torch.float32),
    ):
        op, seen = counting(autocast_cpu=policy)
        x = torch.randn(3, dtype=given, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = op(x)
        assert (seen["dtype"], y.dtype) == (met, met)
        y.backward(torch.randn(3).to(met))
        assert x.grad.dtype == given
        op(x)
        assert seen["dtype"] == given, "outside autocast nothing is cast"


def test_autocast_of_another_device_casts_nothing():
    op, seen = counting(autocast_cuda="lower")
    with torch.autocast("cpu", torch.bfloat16):
        op(torch.randn(3))
    assert seen["dtype"] == torch.float32


def test_backward_under_autocast_is_not_cast_again(backend):
    x = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    w = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    dy = torch.randn(4, 3, device=DEVICE)
    expected = torch.autograd.grad(functional.linear(x, w), (x, w), dy)
    y = functional.linear(x, w)
    with torch.autocast(DEVICE, torch.bfloat16):
        grads = torch.autograd.grad(y, (x, w), dy)
    for g, e in zip(grads, expected, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e, rtol=0, atol=0)


def with_quick_faces(**options):
    """An op x² that tells which of its ways were taken."""
    ways = []

    class Square:
        @staticmethod
        def forward(x):
            ways.append("forward")
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx, dy):
            ways.append("backward")
            return 2 * dy * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent * ctx.saved_tensors[0]

    def value(way, x):
        ways.append(f"{way} value")
        return x * x

    def forward(way, ctx, x):
        ways.append(f"{way} forward")
        ctx.save_for_backward(x)
        return x * x

    def backward(way, ctx, dy):
        ways.append(f"{way} backward")
        return 2 * dy * ctx.saved_tensors[0]

    for way in ("direct", "kernel"):
        for name, function in (("value", value), ("forward", forward), ("backward", backward)):
            setattr(Square, f"{way}_{name}", staticmethod(functools.partial(function, way)))
    return differentiable(**({"autocast_cpu": "lower"} | options))(Square), ways


def test_plain_cpu_tensors_take_the_direct_face():
    op, ways = with_quick_faces()
    x = torch.randn(5, requires_grad=True)
    dy = torch.randn(5)
    (dx,) = torch.autograd.grad(op(x), x, dy)
    torch.testing.assert_close(dx, 2 * dy * x.detach(), rtol=0, atol=0)
    op(x.detach())
    with torch.no_grad():
        op(x)
    assert ways == ["direct forward", "direct backward", "direct value", "direct value"]


class Tagged(torch.Tensor):
    """A subclass that could listen."""


@pytest.mark.parametrize("unary", [False, True])
def test_who_listens_meets_the_general_face(unary):
    op, ways = with_quick_faces(unary=unary)
    x = torch.randn(5, requires_grad=True)
    op(x.detach().as_subclass(Tagged))
    if not unary:
        with torch.autocast("cpu"):
            op(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        op(x)
    with use_backend("formula"):
        op(x)
    torch.func.vmap(op)(x)
    with forward_ad.dual_level():
        op(forward_ad.make_dual(x.detach(), torch.ones(5)))
    op(torch.arange(5))
    assert set(ways) == {"forward"}
    if DEVICE == "cpu":
        ways.clear()
        with use_backend("aten"):
            op(x)
        assert ways == ["direct forward"]


def test_a_backward_that_is_watched_or_differentiated_is_the_general_one():
    op, ways = with_quick_faces()
    x = torch.randn(5, requires_grad=True)
    y = op(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones(5), create_graph=True)
    (ddx,) = torch.autograd.grad(dx, x, torch.ones(5))
    torch.testing.assert_close(ddx, torch.full((5,), 2.0))
    torch.autograd.grad(op(x), x, torch.eye(5), is_grads_batched=True)
    y = op(x)
    with use_backend("formula"):
        y.backward(torch.ones(5))
    with torch.autocast("cpu"):
        op(x).sum().backward()
    y = op(x)
    with Operators():
        torch.autograd.grad(y, x, torch.ones(5), retain_graph=True)
    torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(torch.eye(5))
    assert "direct backward" not in ways


@pytest.mark.parametrize("name", ["logsigmoid", "tanhshrink"])
def test_a_second_derivative_where_forward_keeps_what_the_first_needs(name):
    x, w = torch.randn(2, 7, dtype=torch.float64).unbind()
    x.requires_grad_()
    found = []
    for module in (functional, torch.nn.functional):
        (dx,) = torch.autograd.grad((getattr(module, name)(x) * w).sum(), x, create_graph=True)
        found.append((dx, *torch.autograd.grad((dx * w).sum(), x)))
    torch.testing.assert_close(*found)


#: an op whose values stock gives where nothing wants a gradient, and what else it takes
VALUES = {
    "leaky_relu": (0.2,),
    "hardtanh": (-0.5, 0.5),
    "softplus": (2.0, 10.0),
    "gelu": (),
    "mse_loss": (torch.zeros(5),),
    "binary_cross_entropy_with_logits": (torch.ones(5),),
    "prelu": (torch.tensor([0.3]),),
}


@pytest.mark.parametrize("name", VALUES)
def test_without_a_gradient_stock_answers_and_with_one_we_do(name):
    ours, stock, args = getattr(functional, name), getattr(torch.nn.functional, name), VALUES[name]
    x = torch.randn(5)
    assert torch.equal(ours(x, *args), stock(x, *args))
    assert ours(x, *args).grad_fn is None
    leaf = x.clone().requires_grad_()
    assert "custom_backprop" in type(ours(leaf, *args).grad_fn)._forward_cls.__module__
    if args and isinstance(args[0], torch.Tensor) and name != "binary_cross_entropy_with_logits":
        assert (
            "custom_backprop"
            in type(
                ours(x, args[0].clone().requires_grad_(), *args[1:]).grad_fn
            )._forward_cls.__module__
        )


@pytest.mark.parametrize("name", VALUES)
def test_without_a_gradient_a_backend_asked_for_still_answers(name):
    with use_backend("formula"), Operators() as seen:
        getattr(functional, name)(torch.randn(5), *VALUES[name])
    assert any(o.startswith("custom_backprop::") for o in seen.names)


@pytest.mark.parametrize("name", ["leaky_relu", "mse_loss"])
def test_without_a_gradient_transformations_still_meet_ours(name):
    ours, stock, args = getattr(functional, name), getattr(torch.nn.functional, name), VALUES[name]
    x, t = torch.randn(5), torch.randn(5)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), *args)).tangent
            for f in (ours, stock)
        ]
    torch.testing.assert_close(*tangents)
    with Operators() as seen:
        torch.func.grad(lambda v: ours(v, *args).sum())(x)
    assert any(o.startswith("custom_backprop::") for o in seen.names)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    [
        "mse_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
    ],
)
def test_a_mode_sees_the_primitive_of_a_loss(name):
    x, t = torch.rand(2, 6)
    with Operators() as seen:
        getattr(functional, name)(x.requires_grad_(), t)
    assert f"custom_backprop::{name}_forward" in seen.names
