"""Gradients produced in forward: when one is made, and that handing it out without a copy never
shows."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

from custom_backprop import functional
from custom_backprop.extend import differentiable
from custom_backprop.ops.held import holds, release

seen = {}


@differentiable(keeps=True)
class _mean_square:
    """L = mean x²; dx = dL 2 x / n, made in forward where ``hold`` says so."""

    @staticmethod
    def forward(x, hold):
        return x.square().mean(), 2 * x / x.numel() if hold else x.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0])
        seen["hold"] = inputs[1]
        if inputs[1]:
            seen["held"] = output[1]
        ctx.hold = inputs[1]

    @staticmethod
    def backward(ctx, dy):
        x, held = ctx.saved_tensors
        if ctx.hold and not torch.is_grad_enabled():
            return release(held, dy), None
        return dy * 2 * x / x.numel(), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (x,) = ctx.saved_tensors
        return (2 * x * tangent).mean()


def loss(x):
    return _mean_square(x, holds(x, scalar=True))


def leaf(dtype=torch.float64):
    return torch.randn(3, 700, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("dy", [1.0, 0.37, 0.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaled_by_the_gradient_of_the_loss(backend, dy, dtype):
    x = leaf(dtype)
    (grad,) = torch.autograd.grad(loss(x), x, torch.tensor(dy, dtype=dtype, device=DEVICE))
    assert seen["hold"]
    expected = torch.tensor(dy, dtype=dtype) * (2 * x.detach() / x.numel())
    torch.testing.assert_close(grad, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_handed_out_without_a_copy_where_the_graph_is_freed(backend):
    x = leaf()
    (grad,) = torch.autograd.grad(loss(x) * 3, x)
    assert grad.data_ptr() == seen["held"].data_ptr()


def test_a_retained_graph_keeps_it(backend):
    x = leaf()
    y = loss(x)
    three = torch.tensor(3.0, dtype=x.dtype, device=DEVICE)
    (first,) = torch.autograd.grad(y, x, three, retain_graph=True)
    assert first.data_ptr() != seen["held"].data_ptr()
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(y, x, three, retain_graph=True)
    (third,) = torch.autograd.grad(y, x, three)
    assert torch.equal(second, kept)
    assert torch.equal(third, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, three)


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
def test_a_kept_graph_keeps_what_a_plain_cpu_tensor_holds(name):
    x = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    target = torch.rand(9, 5, device=DEVICE)
    found = []
    for module in (functional, torch.nn.functional):
        y = getattr(module, name)(x, target)
        grads = []
        for dy in (3.0, 1.0, -2.0):
            (dx,) = torch.autograd.grad(y, x, torch.tensor(dy, device=DEVICE), retain_graph=True)
            grads.append(dx.clone())
            dx.zero_()
        found.append(grads)
    torch.testing.assert_close(*found)


def test_accumulates_over_two_losses():
    x = leaf()
    for _ in range(2):
        loss(x).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach() / x.numel())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant):
    x = leaf()
    y = checkpoint(lambda t: loss(t * 2), x, use_reentrant=use_reentrant)
    (y * 3).backward()
    torch.testing.assert_close(x.grad, 3 * 8 * x.detach() / x.numel())


def test_under_hooks_that_keep_what_was_saved():
    x, packed = leaf(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append((t, t.clone())) or t, lambda t: t
    ):
        y = loss(x)
    (y * 3).backward()
    torch.testing.assert_close(x.grad, 6 * x.detach() / x.numel())
    assert len(packed) > 1
    assert all(torch.equal(t, before) for t, before in packed), "another owner's tensor was written"


def test_a_batch_of_gradients_of_the_loss(backend):
    x = leaf()
    dys = torch.tensor([1.0, 0.37, -2.0], dtype=x.dtype, device=DEVICE)
    (grads,) = torch.autograd.grad(loss(x), x, dys, is_grads_batched=True)
    torch.testing.assert_close(grads, dys[:, None, None] * 2 * x.detach() / x.numel())
    y = loss(x)
    grads = torch.vmap(lambda dy: torch.autograd.grad(y, x, dy)[0])(dys)
    torch.testing.assert_close(grads, dys[:, None, None] * 2 * x.detach() / x.numel())


def test_not_held_where_it_would_not_serve():
    x = leaf()
    assert holds(x, scalar=True)
    assert not holds(x, scalar=False), "a gradient per element of the loss is not known in forward"
    assert not holds(x.detach(), scalar=True)
    assert not holds(leaf(torch.float16), scalar=True), (
        "it could underflow before a gradient scaler's factor is known"
    )
    with torch.no_grad():
        assert not holds(x, scalar=True)
    with torch.autograd.forward_ad.dual_level():
        assert not holds(x, scalar=True)
    torch.func.grad(loss)(x.detach())
    assert not seen["hold"]


def test_second_derivative():
    x = leaf()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(second, 8 * x.detach() / x.numel() ** 2)


def test_compiled():
    x = leaf()
    compiled = torch.compile(lambda t: loss(t), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x), x, torch.tensor(0.37, dtype=x.dtype, device=DEVICE))
    torch.testing.assert_close(grad, 0.37 * 2 * x.detach() / x.numel())
