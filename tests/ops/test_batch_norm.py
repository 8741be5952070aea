"""batch_norm beyond what the op database asks of every op."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.backends.channel_norm import batch_input


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype, device=DEVICE) for s in shapes]


def each(t, x):
    """One number a channel, to be broadcast over x."""
    return t.view(-1, *(1 for _ in x.shape[2:]))


def outcome(function, x, weight, bias, *args, **named):
    """y and the gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, *args, **named)
    return y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).to(y).view_as(y))


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 7), (2, 3, 4, 5), (3, 9, 1, 67)])
@pytest.mark.parametrize("last", [False, True])
def test_shapes_and_layouts(shape, last, backend):
    """Channels in the middle or last, longer or shorter than a block, in several parts."""
    x, w, b = tensors(shape, *2 * shape[1:2])
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    found = [
        outcome(lambda x, w, b, m=m: m.batch_norm(x, None, None, w, b, True), x, w, b)
        for m in (functional, F)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    if last and len(shape) > 3:
        assert [t.movedim(1, -1).is_contiguous() for t in found[0][:2]] == [True, True]


def test_the_mean_is_taken_out_before_squares_are_added(backend):
    """One pass over x and x² would leave nothing of this variance."""
    (x,) = tensors((40, 3, 50), dtype=torch.float32)
    x += 4096
    ours = functional.batch_norm(x, None, None, training=True)
    expected = F.batch_norm(x.double(), None, None, training=True).float()
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_running_statistics_follow(dtype, momentum, backend):
    x, mean, variance = tensors((5, 3, 4), 3, 3, dtype=dtype)
    found = []
    for module in (functional, F):
        running = mean.clone(), variance.abs().clone()
        module.batch_norm(x, *running, training=True, momentum=momentum)
        found.append(running)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*found, rtol=4 * eps, atol=eps)


def test_float32_statistics_beside_half_precision(backend):
    x, mean, variance = tensors((5, 3, 4), 3, 3, dtype=torch.float32)
    found = []
    for module in (functional, F):
        running = mean.clone(), variance.abs().clone()
        y = module.batch_norm(x.bfloat16(), *running, mean, mean, training=True)
        assert y.dtype == torch.bfloat16
        found.append(running)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_gradients_of_half_precision_are_summed_in_float32(backend):
    """Sums of many equal numbers stand still in bfloat16."""
    x = torch.randn(4096, 2, device=DEVICE)
    w = torch.ones(2, device=DEVICE).bfloat16().requires_grad_()
    b = torch.zeros(2, device=DEVICE).bfloat16().requires_grad_()
    functional.batch_norm(x.bfloat16(), None, None, w, b, True).sum().backward()
    torch.testing.assert_close(b.grad, torch.full_like(b, 4096.0))


@pytest.mark.parametrize("shape", [(4, 3, 7), (2, 3, 4, 5), (3, 9, 1, 67), (0, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_sums_may_be_of_more_samples(shape, last, backend):
    """What SyncBatchNorm's backward takes: a part's dx is that of the whole, given its sums."""
    whole = (5, *shape[1:])
    x, dy, w, mean = tensors(whole, whole, *2 * shape[1:2])
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    x_hat, rstd, over = x - each(mean, x), w.exp(), [0, *range(2, len(shape))]
    x_hat = x_hat * each(rstd, x)
    along, total = w * (dy * x_hat).mean(over), w * dy.mean(over)
    g = dy * each(w, x) - each(total, x)
    expected = each(rstd, x) * (g - x_hat * each(along, x))
    part = slice(shape[0])
    dx = batch_input(dy[part], x[part], w, mean, rstd, along, total)
    torch.testing.assert_close(dx, expected[part], rtol=1e-12, atol=1e-12)


ONE = torch.ones(3)
BAD = [
    ((torch.ones(4), None, None), {"training": True}, IndexError),
    ((torch.ones(4, 3), None, None), {}, RuntimeError),
    ((torch.ones(4, 3), ONE, None), {}, RuntimeError),
    ((torch.ones(4, 3), ONE, None), {"training": True}, ValueError),
    ((torch.ones(4, 3), torch.ones(4), torch.ones(4)), {}, RuntimeError),
    ((torch.ones(4, 3), ONE, ONE, torch.ones(4)), {}, RuntimeError),
    ((torch.ones(4, 3), ONE, ONE, ONE.double(), ONE.double()), {}, RuntimeError),
    ((torch.arange(12).view(4, 3), None, None), {"training": True}, NotImplementedError),
    ((torch.ones(1, 3), None, None), {"training": True}, ValueError),
    ((torch.ones(1, 3, 1), None, None), {"training": True}, ValueError),
    (("a", None, None), {}, (TypeError, AttributeError)),
    ((torch.ones(4, 3), ONE, ONE), {"training": True, "momentum": None}, TypeError),
    ((torch.ones(4, 3), None, None), {"training": True, "eps": 0.0}, ValueError),
    ((torch.ones(4, 3), ONE, ONE), {"eps": -1.0}, ValueError),
    ((torch.ones(4, 3), ONE.clone().requires_grad_(), ONE), {"training": True}, RuntimeError),
]


@pytest.mark.parametrize(("arguments", "named", "error"), BAD)
def test_bad_calls_raise_what_stock_raises(arguments, named, error):
    for module in (functional, F):
        with pytest.raises(error):
            module.batch_norm(*arguments, **named)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)])
def test_an_empty_batch_moves_no_running_statistics(shape, backend):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    w = torch.ones(3, device=DEVICE, requires_grad=True)
    mean, variance = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y = functional.batch_norm(x, mean, variance, w, None, True)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(mean, torch.ones_like(mean))
    assert torch.equal(variance, torch.ones_like(mean))


SHAPES = {"1d": (6, 4, 5), "2d": (3, 4, 2, 5), "3d": (3, 4, 2, 2, 3)}


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("d", SHAPES)
def test_modules_train_and_evaluate_as_stocks(d, tracks, momentum):
    name = f"BatchNorm{d}"
    options = {"momentum": momentum, "track_running_stats": tracks, "eps": 0.1}
    stock = getattr(torch.nn, name)(4, **options).to(DEVICE, torch.float64)
    ours = custom_backprop.convert(copy.deepcopy(stock), include="*")
    assert type(ours) is getattr(nn, name)
    for step in range(4):
        if step == 3:
            ours.eval(), stock.eval()
        (x,) = tensors(SHAPES[d])
        found = []
        for module in (ours, stock):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            module.zero_grad()
            y.square().sum().backward()
            found.append((y, leaf.grad, module.weight.grad, *module.buffers()))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
    assert type(custom_backprop.revert(ours)) is type(stock)
    with pytest.raises(ValueError, match="expected"):
        ours(torch.ones(4, device=DEVICE, dtype=torch.float64))


def test_compiled_training_moves_the_running_statistics():
    torch._dynamo.reset()
    stock = torch.nn.BatchNorm1d(4)
    ours = custom_backprop.convert(copy.deepcopy(stock), include="*")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(5, 4)
        found = compiled(x), stock(x)
        torch.testing.assert_close(*found)
    torch.testing.assert_close(tuple(ours.buffers()), tuple(stock.buffers()))


def test_evaluation_keeps_nothing_of_the_batch(backend):
    """The second derivative with respect to x is 0, as the statistics are constants."""
    x, w, b = (t.requires_grad_() for t in tensors((4, 3), 3, 3))
    y = functional.batch_norm(x, torch.zeros(3).to(x), torch.ones(3).to(x), w, b)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(second, (2 * w**2 / (1 + 1e-5)).detach().expand(4, 3))


def test_stocks_second_derivative_under_torch_func_is_wrong():
    """torch 2.13: the block of the Hessian for weight, then input. When this fails, the spec's
    reference can be stock's everywhere."""
    x, v = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    w = torch.randn(3, dtype=torch.float64)

    def hessian(module):
        return torch.func.hessian(
            lambda x, w: (module.batch_norm(x, None, None, w, None, True) * v).sum(), argnums=(0, 1)
        )(x, w)

    ours, stock = hessian(functional), hessian(F)
    torch.testing.assert_close(ours[1][0], ours[0][1].permute(2, 0, 1))
    torch.testing.assert_close(ours[0], stock[0])
    assert not torch.allclose(stock[1][0], ours[1][0]), "stock is right now"


def test_stock_has_no_second_derivative_of_a_bias_alone():
    """torch 2.13: it takes the weight that is not there. When this fails, the spec's reference can
    be stock's there too."""
    x, b = (t.requires_grad_() for t in tensors((4, 3), 3))
    mean, variance = torch.zeros(3).to(x), torch.ones(3).to(x)

    def second(module):
        y = module.batch_norm(x, mean, variance, None, b)
        dx, db = torch.autograd.grad(y.pow(3).sum(), (x, b), create_graph=True)
        return torch.autograd.grad(dx.sin().sum() + db.sin().sum(), x)[0]

    assert second(functional).isfinite().all()
    with pytest.raises(RuntimeError, match="Expected a proper Tensor but got None"):
        second(F)
