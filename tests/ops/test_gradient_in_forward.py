"""Gradients made in forward: when one is made, and that handing it out without a copy never
shows."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from custom_backprop import functional
from custom_backprop.backends.loss import primitives
from custom_backprop.ops.gradient import is_made_in_forward
from custom_backprop.testing import Make, database
from custom_backprop.testing.checks.traced import Recorder

FORWARD_OP = primitives["mse_loss"][0]
#: operators whose second result is made for backward where one is wanted
MAKING = {*(f"{name}_forward" for name in primitives), "cross_entropy_forward", "info_nce"}


def loss(x):
    return functional.mse_loss(x, torch.zeros_like(x))


def leaf(dtype=torch.float64):
    return torch.randn(3, 700, dtype=dtype, device=DEVICE, requires_grad=True)


def saved_gradient(y):
    """What forward made and saved, or None."""
    return y.grad_fn.saved_tensors[-1]


def expected(x, dy=1.0):
    return dy * 2 * x.detach() / x.numel()


@pytest.mark.parametrize("dy", [1.0, 0.37, 0.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaled_by_the_gradient_of_the_loss(backend, dy, dtype):
    x = leaf(dtype)
    y = loss(x)
    assert saved_gradient(y) is not None
    (grad,) = torch.autograd.grad(y, x, torch.tensor(dy, dtype=dtype, device=DEVICE))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad, expected(x.double(), dy).to(dtype), rtol=2 * eps, atol=0)


def test_handed_out_without_a_copy_where_the_graph_is_freed(backend):
    x = leaf()
    y = loss(x)
    made = saved_gradient(y).data_ptr()
    (grad,) = torch.autograd.grad(y * 3, x)
    assert grad.data_ptr() == made


@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
def test_a_retained_graph_gives_the_same_again(name, backend):
    x, t = leaf(), torch.rand(3, 700, dtype=torch.float64, device=DEVICE)
    y, dy = getattr(functional, name)(x, t), torch.tensor(3.0, dtype=x.dtype, device=DEVICE)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    before = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (third,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(second, before)
    assert torch.equal(third, before)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


def test_accumulates_over_two_losses():
    x = leaf()
    for _ in range(2):
        loss(x).backward()
    torch.testing.assert_close(x.grad, expected(x, 2))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant):
    x = leaf()
    y = checkpoint(lambda t: loss(t * 2), x, use_reentrant=use_reentrant)
    (y * 3).backward()
    torch.testing.assert_close(x.grad, expected(x, 12))


def test_nothing_is_written_that_a_hook_on_saved_tensors_has_seen():
    x, packed = leaf(), []

    def pack(t):
        packed.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = loss(x)
    (y * 3).backward()
    torch.testing.assert_close(x.grad, expected(x, 3))
    assert len(packed) > 1
    assert all(torch.equal(t, before) for t, before in packed)


def test_a_batch_of_gradients_of_the_loss(backend):
    x = leaf()
    dys = torch.tensor([1.0, 0.37, -2.0], dtype=x.dtype, device=DEVICE)
    each = dys[:, None, None] * expected(x)
    (grads,) = torch.autograd.grad(loss(x), x, dys, is_grads_batched=True)
    torch.testing.assert_close(grads, each)
    y = loss(x)
    grads = torch.vmap(lambda dy: torch.autograd.grad(y, x, dy)[0])(dys)
    torch.testing.assert_close(grads, each)


def test_not_made_where_it_would_not_serve():
    x = leaf()
    assert is_made_in_forward(FORWARD_OP, x, scalar=True)
    assert not is_made_in_forward(FORWARD_OP, x, scalar=False), "each element has its own dy"
    assert not is_made_in_forward(FORWARD_OP, x.detach(), scalar=True)
    half = leaf(torch.float16)
    assert not is_made_in_forward(FORWARD_OP, half, scalar=True), "it could underflow"
    with torch.no_grad():
        assert not is_made_in_forward(FORWARD_OP, x, scalar=True)
    with torch.autograd.forward_ad.dual_level():
        assert not is_made_in_forward(FORWARD_OP, x, scalar=True)
    made = []

    def inside(t):
        made.append(is_made_in_forward(FORWARD_OP, t, scalar=True))
        return loss(t)

    torch.func.grad(inside)(x.detach())
    assert made == [False]


MAKERS = [s for s in database().values() if MAKING & {s.name, f"{s.name}_forward"}]


@pytest.mark.parametrize("spec", MAKERS, ids=str)
def test_made_only_where_a_gradient_is_wanted(spec, backend):
    sample = spec.large(Make(DEVICE, torch.float32), "small")
    frozen = [a.detach() if isinstance(a, torch.Tensor) else a for a in sample.args]
    made = []
    for enabled, args in ((True, sample.args), (False, sample.args), (True, frozen)):
        with torch.set_grad_enabled(enabled), Recorder() as recorder:
            spec.function(*args, **sample.kwargs)
        made += [
            any(t.numel() for t in tree_leaves(operator(*given))[1:] if t is not None)
            for operator, given, _ in recorder.calls.values()
            if operator._schema.name.split("::")[1] in MAKING
        ]
    assert made == [True, False, False]


def test_second_derivative():
    x = leaf()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(second, 8 * x.detach() / x.numel() ** 2)


def test_compiled():
    x = leaf()
    compiled = torch.compile(lambda t: loss(t), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x), x, torch.tensor(0.37, dtype=x.dtype, device=DEVICE))
    torch.testing.assert_close(grad, expected(x, 0.37))
