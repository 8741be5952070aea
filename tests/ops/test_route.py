"""Who watches a call, and which implementation therefore runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DEVICE
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from custom_backprop import functional, use_backend
from custom_backprop.backends import interpreting
from custom_backprop.extend import op, primitive
from custom_backprop.ops.route import FLOAT32, LOWER

LIBRARY = torch.library.Library("route_test", "DEF")
_numbers = itertools.count()


def square(**attributes):
    """An op x², and the list of implementations that were called. Forward returns x as statistics
    too where ``has_statistics`` is among the attributes."""
    called, number = [], next(_numbers)
    has_statistics = attributes.get("has_statistics", False)

    def implementation(name, run):
        def call(*args):
            called.append((name, args[0].dtype))
            return run(*args)

        return call

    def both(run, which):
        return {name: implementation(f"{name} {which}", run) for name in ("formula", "aten")} | {
            "triton": implementation(f"triton {which}", run)
        }

    square_op = primitive(
        f"square{number}(Tensor x) -> {'(Tensor y, Tensor s)' if has_statistics else 'Tensor'}",
        **both(lambda x: (x * x, x.clone()) if has_statistics else x * x, "forward"),
        library=LIBRARY,
    )
    square_backward_op = primitive(
        f"square_backward{number}(Tensor dy, Tensor x) -> Tensor",
        **both(lambda dy, x: 2 * dy * x, "backward"),
        library=LIBRARY,
    )

    class Square:
        """y = x²."""

        forward_op, backward_op = square_op, square_backward_op

        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        def backward(run, ctx, dy):
            return run(dy, *ctx.saved_tensors)

        def jvp(ctx, tx, *_):
            return 2 * tx * ctx.saved_tensors[0]

    for name, value in attributes.items():
        setattr(Square, name, value)
    return op(Square), called


def names(called):
    return [name for name, _ in called]


#: what plain tensors of the tests' device take
DEFAULT = "triton" if DEVICE == "cuda" else "aten"


def leaf():
    return torch.randn(5, device=DEVICE, requires_grad=True)


def test_the_op_has_the_definitions_name_and_docstring():
    f, _ = square()
    assert f.__name__ == "Square"
    assert f.__doc__ == "y = x²."
    assert f(leaf()).grad_fn.name().startswith("Square")


def test_plain_tensors_take_the_implementation_of_their_device():
    f, called = square()
    x, dy = leaf(), torch.randn(5, device=DEVICE)
    (dx,) = torch.autograd.grad(f(x), x, dy)
    torch.testing.assert_close(dx, 2 * dy * x.detach(), rtol=0, atol=0)
    assert names(called) == [f"{DEFAULT} forward", f"{DEFAULT} backward"]


@pytest.mark.parametrize("forced", ["aten", "formula", "triton"])
def test_a_forced_backend_takes_its_own(forced):
    if forced == "triton" and DEVICE == "cpu" and not interpreting():
        pytest.skip("kernels do not run on a CPU")
    f, called = square()
    x = leaf()
    with use_backend(forced):
        torch.autograd.grad(f(x), x, torch.ones_like(x))
    assert names(called) == [f"{forced} forward", f"{forced} backward"]


def test_nothing_is_saved_where_nothing_wants_a_gradient():
    saved = []

    def setup_context(ctx, inputs, output):
        saved.append(output)
        ctx.save_for_backward(inputs[0])

    f, _ = square(setup_context=setup_context)
    x = leaf()
    assert f(x.detach()).grad_fn is None
    with torch.no_grad():
        assert f(x).grad_fn is None
    with torch.inference_mode():
        assert f(x.detach().clone()).grad_fn is None
    assert not saved
    assert f(x).grad_fn is not None
    assert len(saved) == 1


class Operators(TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_meets_the_operators():
    f, called = square()
    x = leaf()
    y = f(x)
    with Operators() as seen:
        f(x)
        torch.autograd.grad(y, x, torch.ones_like(x))
    assert [n.rstrip("0123456789") for n in seen.names if n.startswith("route_test")] == [
        "route_test::square",
        "route_test::square_backward",
    ]
    assert set(names(called)) == {f"{DEFAULT} forward", f"{DEFAULT} backward"}


class Tagged(torch.Tensor):
    """A subclass that hears of calls."""

    heard: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_subclass_hears_of_the_op_itself():
    f, _ = square()
    Tagged.heard.clear()
    y = f(torch.randn(5).as_subclass(Tagged))
    assert type(y) is Tagged
    assert f in Tagged.heard


class Listening(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_hears_of_the_op_itself():
    f, _ = square()
    with Listening() as mode:
        f(leaf())
        functional.mse_loss(leaf(), torch.zeros(5, device=DEVICE))
    assert f in mode.heard
    assert functional.mse_loss in mode.heard


def test_forward_mode_and_transforms():
    f, _ = square()
    x, t = torch.randn(3, device=DEVICE), torch.randn(3, device=DEVICE)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, 2 * x * t)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (t,))[1], 2 * x * t)
    torch.testing.assert_close(torch.vmap(f)(x), x * x)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(x), 2 * x)
    torch.testing.assert_close(torch.func.hessian(lambda v: f(v).sum())(x), 2 * torch.eye(3).to(x))


def test_a_differentiated_or_batched_backward_is_the_formula():
    f, called = square()
    x = leaf()
    (dx,) = torch.autograd.grad(f(x), x, torch.ones_like(x), create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(ddx, torch.full_like(x, 2))
    torch.autograd.grad(f(x), x, torch.eye(5, device=DEVICE), is_grads_batched=True)
    y, eye = f(x), torch.eye(5, device=DEVICE)
    torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(eye)
    backwards = [name for name in names(called) if name.endswith("backward")]
    assert set(backwards) == {"formula backward"}
    assert len(backwards) >= 3


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    ("policy", "given", "met"),
    [
        (LOWER, torch.float32, torch.bfloat16),
        (LOWER, torch.float64, torch.float64),
        (FLOAT32, torch.bfloat16, torch.float32),
        (FLOAT32, torch.float64, torch.float64),
        ({}, torch.float32, torch.float32),
    ],
)
def test_autocast_casts_once_above_autograd(policy, given, met, statistics):
    f, called = square(autocast=policy, has_statistics=statistics)
    x = torch.randn(3, dtype=given, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = f(x)
    assert (called[-1][1], y.dtype) == (met, met)
    y.backward(torch.randn(3, device=DEVICE).to(met))
    assert x.grad.dtype == given
    f(x)
    assert called[-1][1] == given, "outside autocast nothing is cast"


def test_autocast_of_another_device_casts_nothing():
    f, called = square(autocast={"cuda": "lower"})
    with torch.autocast("cpu", torch.bfloat16):
        f(torch.randn(3))
    assert called[-1][1] == torch.float32


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


@pytest.mark.parametrize("name", ["silu", "mse_loss", "softmax"])
def test_dynamo_sees_the_formula(name):
    graphs, args = [], {"mse_loss": (torch.zeros(5, device=DEVICE),), "softmax": (0,)}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = leaf()
    compiled = torch.compile(getattr(functional, name), backend=backend, fullgraph=True)
    stock = getattr(torch.nn.functional, name)
    found = []
    for f in (compiled, stock):
        y = f(x, *args.get(name, ()))
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*found)
    code = "".join(str(m.graph) for m in graphs[0].modules() if hasattr(m, "graph"))
    assert "custom_backprop" not in code


def test_a_traced_kernel_stays_an_operator_only_on_a_gpu():
    f = primitive(
        f"kernel{next(_numbers)}(Tensor x) -> Tensor",
        formula=lambda x: x + 1,
        triton=lambda x: x + 1,
        traced="kernel",
        library=LIBRARY,
    )
    with Operators() as seen:
        f.traced(torch.zeros(2))
    assert not [n for n in seen.names if n.startswith("route_test")]
    assert not f.is_traced_whole(torch.zeros(2))


def test_integers_and_complex_numbers_take_stock():
    for x in (torch.arange(5), torch.randn(3, dtype=torch.complex64)):
        torch.testing.assert_close(functional.sigmoid(x), torch.sigmoid(x))


def test_forward_over_reverse():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    t, w = torch.randn(2, 3, dtype=torch.float64)
    found = [
        torch.autograd.functional.vhp(lambda v, f=f: (f(v) * w).sum(), x, t)[1]
        for f in (functional.silu, torch.nn.functional.silu)
    ]
    torch.testing.assert_close(*found)
