"""An op with several outputs: x² and x³, and e^x as its statistic."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from custom_backprop.extend import op, primitive

LIBRARY = torch.library.Library("outputs_test", "DEF")


def _forward(x):
    return x * x, x**3, x.exp()


def _backward(dy, dz, x):
    terms = [d * f for d, f in ((dy, 2 * x), (dz, 3 * x * x)) if d is not None]
    return sum(terms[1:], terms[0])


class Powers:
    """y = x², z = x³;  dx = 2 x dy + 3 x² dz."""

    forward_op = primitive(
        "powers(Tensor x) -> (Tensor y, Tensor z, Tensor s)",
        formula=_forward,
        triton=_forward,
        library=LIBRARY,
    )
    backward_op = primitive(
        "powers_backward(Tensor? dy, Tensor? dz, Tensor x) -> Tensor",
        formula=_backward,
        triton=_backward,
        library=LIBRARY,
    )
    outputs, has_statistics = 2, True

    def setup_context(ctx, inputs, output):
        *_, s = output
        ctx.save_for_backward(inputs[0], s)

    def backward(run, ctx, dy, dz):
        x, _ = ctx.saved_tensors
        return run(dy, dz, x)

    def jvp(ctx, tx):
        x, _ = ctx.saved_tensors
        return 2 * x * tx, 3 * x * x * tx


powers = op(Powers)


@pytest.fixture
def x():
    return torch.randn(3, 5, dtype=torch.float64, requires_grad=True)


def test_first_and_second_derivatives(x):
    y, z = powers(x)
    assert torch.equal(y, x * x)
    assert torch.equal(z, x**3)
    assert gradcheck(powers, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(powers, x)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses(x, used):
    (dx,) = torch.autograd.grad((powers(x)[used] * 1.5).sum(), x)
    torch.testing.assert_close(dx, 1.5 * (2 * x, 3 * x * x)[used])


def test_without_a_gradient(x):
    with torch.no_grad():
        y, z = powers(x)
    assert torch.equal(y, x * x)
    assert torch.equal(z, x**3)
    assert not y.requires_grad
    assert not z.requires_grad


def test_torch_func(x):
    x = x.detach()
    _, tangents = torch.func.jvp(powers, (x,), (x,))
    torch.testing.assert_close(tangents, (2 * x * x, 3 * x**3))
    y, z = torch.func.vmap(powers)(x)
    assert torch.equal(y, x * x)
    assert torch.equal(z, x**3)
    rows = torch.func.vmap(torch.func.grad(lambda row: (row * powers(row)[1]).sum()))(x)
    torch.testing.assert_close(rows, 4 * x**3)
    with forward_ad.dual_level():
        y, z = powers(forward_ad.make_dual(x, x))
        torch.testing.assert_close(forward_ad.unpack_dual(z).tangent, 3 * x**3)


def test_compiled(x):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        y, z = powers(x)
        return (y * 1.5 + z * 2.5).sum()

    (dx,) = torch.autograd.grad(run(x), x)
    torch.testing.assert_close(dx, 3 * x + 7.5 * x * x)
