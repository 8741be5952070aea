"""group_norm and instance_norm beyond what the op database asks of every op."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.backends import why_not


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype, device=DEVICE) for s in shapes]


def outcome(function, x, weight, bias):
    """y and the gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).to(y).view_as(y))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 7), (1, 6, 1, 2111), (2, 6, 4, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_shapes_and_layouts(shape, groups, last, backend):
    """Channels in the middle or last, groups of one, some and all, longer than a block."""
    x, w, b = tensors(shape, *2 * shape[1:2])
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    found = [
        outcome(lambda x, w, b, m=m: m.group_norm(x, groups, w, b), x, w, b)
        for m in (functional, F)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_gradients_of_parameters_are_sums_over_many_samples(backend):
    """More tiles than programs, whose sums stay with their channels: a tile of the kernels has two
    of the three groups of a sample."""
    x, w, b = tensors((40, 9, 200), 9, 9)
    found = [
        outcome(lambda x, w, b, m=m: m.group_norm(x, 3, w, b), x, w, b) for m in (functional, F)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [50, 3000, 3200])
def test_the_mean_is_taken_out_before_squares_are_added(length, backend):
    """One pass over x and x² would leave nothing of this variance. In a block or longer,
    which a thread reads one by one or several at once."""
    (x,) = tensors((2, 6, length), dtype=torch.float32)
    x += 4096
    expected = F.group_norm(x.double(), 2).float()
    torch.testing.assert_close(functional.group_norm(x, 2), expected, rtol=0, atol=2e-3)


BAD_OF_GROUP_NORM = [
    ((torch.ones(4), 2), RuntimeError),
    ((torch.ones(4, 6), 4), RuntimeError),
    ((torch.ones(4, 6), -1), RuntimeError),
    ((torch.ones(4, 6), 3, torch.ones(5)), RuntimeError),
    ((torch.ones(4, 6), 3, torch.ones(6, 1)), RuntimeError),
    ((torch.ones(4, 6), 3, torch.ones(6).double()), RuntimeError),
    ((torch.ones(1, 6), 6), ValueError),
    ((torch.ones(1, 6, 1), 6), ValueError),
    ((torch.ones(4, 6).int(), 3), NotImplementedError),
    ((torch.ones(4, 6), 3.0), TypeError),
    ((torch.ones(4, 6), 3, None, None, "a"), TypeError),
]


@pytest.mark.parametrize(("arguments", "error"), BAD_OF_GROUP_NORM)
def test_bad_calls_of_group_norm_raise_what_stock_raises(arguments, error):
    for module in (functional, F):
        with pytest.raises(error):
            module.group_norm(*arguments)


ONE = torch.ones(3)
BAD_OF_INSTANCE_NORM = [
    ((torch.ones(4, 3),), ValueError),
    ((torch.ones(4, 3, 1),), ValueError),
    ((torch.ones(4, 3, 2), None, None, None, None, False), RuntimeError),
    ((torch.ones(4, 3, 2), None, None, torch.ones(4)), RuntimeError),
    ((torch.ones(4, 3, 2), torch.ones(4), torch.ones(4)), RuntimeError),
    ((torch.ones(4, 3, 2).int(),), NotImplementedError),
    ((torch.ones(4, 3, 2), None, None, ONE.double()), RuntimeError),
]


@pytest.mark.parametrize(("arguments", "error"), BAD_OF_INSTANCE_NORM)
def test_bad_calls_of_instance_norm_raise_what_stock_raises(arguments, error):
    for module in (functional, F):
        with pytest.raises(error):
            module.instance_norm(*arguments)


def test_one_number_a_channel_is_enough_in_evaluation(backend):
    x, mean, variance, w, b = tensors((2, 3, 1), 3, 3, 3, 3)
    found = [
        m.instance_norm(x, mean, variance.abs(), w, b, use_input_stats=False)
        for m in (functional, F)
    ]
    torch.testing.assert_close(*found)


SHAPES = {"1d": (4, 5), "2d": (4, 2, 5), "3d": (4, 2, 2, 3)}


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("d", SHAPES)
def test_modules_train_and_evaluate_as_stocks(d, tracks, momentum):
    """Of batches, and of single samples without a batch."""
    name = f"InstanceNorm{d}"
    options = {"momentum": momentum, "track_running_stats": tracks, "affine": True, "eps": 0.1}
    stock = getattr(torch.nn, name)(4, **options).to(DEVICE, torch.float64)
    ours = custom_backprop.convert(copy.deepcopy(stock))
    assert type(ours) is getattr(nn, name)
    for step, batch in enumerate([(3,), (), (2,), (3,)]):
        if step == 3:
            ours.eval(), stock.eval()
        (x,) = tensors((*batch, *SHAPES[d]))
        found = []
        for module in (ours, stock):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            module.zero_grad()
            y.pow(3).sum().backward()
            found.append((y, leaf.grad, module.weight.grad, module.bias.grad, *module.buffers()))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
    assert type(custom_backprop.revert(ours)) is type(stock)


def test_stock_has_no_gradient_of_a_bias_alone(backend):
    """torch 2.13: it asks the weight that is not there for its device. When this fails, the spec's
    reference can be stock's."""
    x, b = (t.requires_grad_() for t in tensors((2, 4, 3), 4))
    functional.group_norm(x, 2, None, b).sum().backward()
    torch.testing.assert_close(b.grad, torch.full_like(b, 6.0))
    with pytest.raises(RuntimeError, match="tensor does not have a device"):
        F.group_norm(x, 2, None, b).sum().backward()


@pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason="it is the kernels' mean")
@pytest.mark.parametrize("shape", [(2, 24, 3200), (2, 24, 20480), (3, 8, 7001)], ids=str)
def test_a_far_mean_is_rounded_twice(shape):
    """In each part and for all. Numbers from 4096 on are multiples of 2^-11: a rounding is off by
    half of one, and those of the parts even out."""
    x = 4096 + 0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with custom_backprop.use_backend("triton"):
        y = functional.batch_norm(x, None, None, training=True, eps=1e-12)
    off = (y - F.batch_norm(x.double(), None, None, training=True, eps=1e-12)).mean((0, 2))
    assert off.abs().max() <= 1.4 * 2**-12 / 0.25
