"""The face of a Function that goes from plain tensors to the kernels: who takes it, and who meets
the general one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from conftest import DEVICE
from test_function import with_quick_faces
from torch.autograd import forward_ad

from custom_backprop import functional, use_backend
from custom_backprop.backends import why_not

pytestmark = pytest.mark.skipif(
    why_not("triton", DEVICE) is not None, reason="kernels do not run here"
)


@pytest.fixture(autouse=True)
def _by_kernels():
    with use_backend("triton"):
        yield


def leaf():
    return torch.randn(5, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("unary", [False, True])
def test_plain_tensors_take_it(unary):
    op, ways = with_quick_faces(unary=unary)
    x = leaf()
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(op(x), x, dy)
    torch.testing.assert_close(dx, 2 * dy * x.detach(), rtol=0, atol=0)
    op(x.detach())
    with torch.no_grad():
        op(x)
    assert ways == ["kernel forward", "kernel backward", "kernel value", "kernel value"]


@pytest.mark.parametrize("unary", [False, True])
def test_who_listens_meets_the_general_face(unary):
    op, ways = with_quick_faces(unary=unary)
    x = leaf()
    with torch.autocast(DEVICE, torch.bfloat16):
        op(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        op(x)
    with use_backend("formula"):
        op(x)
    torch.func.vmap(op)(x)
    with forward_ad.dual_level():
        op(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
    op(torch.arange(5, device=DEVICE))
    assert set(ways) == {"forward"}


def test_a_backward_that_is_watched_or_differentiated_is_the_general_one():
    op, ways = with_quick_faces()
    x = leaf()
    ones, eye = torch.ones(5, device=DEVICE), torch.eye(5, device=DEVICE)
    (dx,) = torch.autograd.grad(op(x), x, ones, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, x, ones)
    torch.testing.assert_close(ddx, 2 * ones)
    torch.autograd.grad(op(x), x, eye, is_grads_batched=True)
    y = op(x)
    with use_backend("formula"):
        torch.autograd.grad(y, x, ones, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.autograd.grad(y, x, ones, retain_graph=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        torch.autograd.grad(y, x, ones, retain_graph=True)
    torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(eye)
    assert "kernel backward" not in ways
    torch.autograd.grad(y, x, ones)
    assert ways[-1] == "kernel backward"


def calls():
    x, t = (torch.randn(3, 5, device=DEVICE, dtype=torch.float64) for _ in range(2))
    classes = torch.randint(5, (3,), device=DEVICE)
    w, b = (
        torch.randn(4, 5, device=DEVICE, dtype=torch.float64),
        torch.randn(4, device=DEVICE, dtype=torch.float64),
    )
    return {
        "silu": (F.silu, x), "softplus": (F.softplus, x, 2, 10), "relu": (F.relu, x), "softmax": (F.softmax, x, -1),
        "mse_loss": (F.mse_loss, x, t), "kl_div": (lambda *a, **k: F.kl_div(*a, **k), x, t.softmax(1)),
        "nll_loss": (F.nll_loss, x, classes), "cross_entropy": (F.cross_entropy, x, classes), "linear": (F.linear, x, w, b),
        "linear_activation": (lambda *a: torch.tanh(F.linear(*a[:3])), x, w, b, "tanh"),
    }  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss"
)  # stock's own words on kl_div
@pytest.mark.parametrize("name", calls())
def test_every_kind_of_op_has_it(name, monkeypatch):
    """No primitive is met on the way, forward or backward; the answer is stock's. After a second
    backward too."""
    reference, x, *args = calls()[name]
    monkeypatch.setattr(
        "custom_backprop.backends.library._unobserved",
        lambda args: pytest.fail("a primitive was called"),
    )
    x.requires_grad_()
    y = getattr(functional, name)(x, *args)
    dy = torch.randn_like(y)
    first, second = torch.autograd.grad(y, x, dy, retain_graph=True), torch.autograd.grad(y, x, dy)
    truth = reference(x, *args)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(first, torch.autograd.grad(truth, x, dy))
    assert torch.equal(*first, *second)
