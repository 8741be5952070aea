"""Attention beyond what the op database drives: shapes, tiles of the band, rows that attend to
nothing, what is saved, layouts, dropout, bad calls, and bugs of others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional
from custom_backprop.backends import attention as primitives
from custom_backprop.backends import use_backend
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.specs.attention import stock

attention = functional.scaled_dot_product_attention


def tensor(*shape, dtype=torch.float64, requires_grad=True):
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)


def both(inputs, theirs=stock, **options):
    """(value, gradients) of ours and of theirs, for one random dy."""
    leaves = [t for t in inputs if t.is_floating_point()]
    dy = torch.randn_like(theirs(*inputs, **options))
    for function in (attention, theirs):
        y = function(*inputs, **options)
        yield y, *torch.autograd.grad(y, leaves, dy)


def assert_same(inputs, theirs=stock, **options):
    torch.testing.assert_close(*both(inputs, theirs, **options), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 3, 1, 4, 3), (2, 3, 1, 5, 3), (2, 3, 1, 5, 2)), {}),
        (((2, 3, 2), (2, 4, 2), (2, 4, 2)), {"is_causal": True}),
        (((2, 2, 2), (3, 2, 4, 2), (1, 1, 4, 1)), {}),
        (((1, 6, 2, 1), (2, 2, 3, 1), (1, 3, 3, 2)), {"enable_gqa": True}),
        (((4, 2, 1), (2, 3, 1), (2, 3, 1)), {"enable_gqa": True}),
        (((2, 1, 3, 2), (2, 1, 2, 2), (2, 1, 2, 2), (2, 1, 1, 2)), {}),
        (((2, 2, 1, 3, 2), (2, 1, 2, 2), (2, 2), (2, 1, 1, 2)), {"scale": -1.5}),
        (((1, 1, 0, 2), (1, 1, 3, 2), (1, 1, 3, 2)), {}),
        (((1, 1, 2, 2), (1, 1, 0, 2), (1, 1, 0, 2)), {"is_causal": True}),
        (((1, 1, 2, 0), (1, 1, 3, 0), (1, 1, 3, 2)), {}),
        (((1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 0)), {}),
        (((0, 2, 2, 2), (0, 2, 3, 2), (0, 2, 3, 2)), {}),
        (((1, 0, 2, 2), (1, 0, 3, 2), (1, 0, 3, 2)), {}),
    ],
    ids=str,
)
def test_shapes(shapes, options, backend):
    """Broadcast, grouped, empty; the fourth is a mask with a gradient."""
    assert_same([tensor(*s) for s in shapes], **options)


@pytest.mark.parametrize(
    ("window", "is_causal"),
    [(None, False), (None, True), ((5, 9), False), ((0, None), True), ((None, 0), False)],
    ids=str,
)
@pytest.mark.parametrize(("L", "S"), [(37, 21), (18, 40)])
def test_a_band_over_many_tiles(L, S, is_causal, window, backend):
    """The last query stands at the last key of a window; is_causal begins at the first of both.
    Some queries attend to nothing, and some keys are met by none."""
    inputs = tensor(1, 2, L, 3), tensor(1, 1, S, 3), tensor(1, 1, S, 2)
    options = {"is_causal": is_causal, "window": window, "enable_gqa": True}
    slopes = torch.tensor([0.3, 0.1], device=DEVICE, dtype=torch.float64)
    assert_same(inputs, alibi_slopes=slopes, **options)


@pytest.mark.parametrize("size", [40, 200])
def test_chunks_of_batches_and_of_rows(size, monkeypatch):
    monkeypatch.setattr(primitives, "CHUNK", size)
    inputs = tensor(5, 2, 4, 2), tensor(5, 1, 6, 2), tensor(5, 1, 6, 3), tensor(5, 1, 4, 6)
    with use_backend("aten"):
        assert_same(inputs, enable_gqa=True, window=(3, 1))
        assert_same((*inputs[:3], tensor(1, 2, 4, 1)), enable_gqa=True, window=(3, 1))


def test_a_masks_gradient_over_many_tiles(backend):
    mask = tensor(2, 1, 19, 18)
    assert_same([tensor(2, 2, 19, 2), tensor(2, 2, 18, 2), tensor(2, 2, 18, 2), mask])


def test_a_boolean_mask_with_rows_of_nothing(backend):
    mask = torch.rand(3, 1, 17, 33, device=DEVICE) < 0.4
    mask[:, :, 5], mask[0, :, :, :20] = False, False
    inputs = tensor(3, 1, 17, 2), tensor(3, 1, 33, 2), tensor(3, 1, 33, 2), mask
    (y, *grads), theirs = both(inputs)
    torch.testing.assert_close((y, *grads), theirs, rtol=1e-9, atol=1e-11)
    assert not y[:, :, 5].count_nonzero()
    assert not grads[0][:, :, 5].count_nonzero()
    assert not grads[1][0, :, :20].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_mask_in_float32(dtype, backend):
    q, k, v = (tensor(1, 2, 3, 4, dtype=dtype) for _ in range(3))
    mask = tensor(3, 3, dtype=torch.float32)
    (y, *grads), (expected, *_) = both((q, k, v, mask))
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype] * 3 + [torch.float32]
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (1, 2)}], ids=str)
def test_no_matrix_of_scores_is_saved(options, backend):
    kept = []
    q, k, v = (tensor(1, 2, 40, 2) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(q, k, v, **options)
    assert sorted(t.numel() for t in kept) == [2 * 40, *[2 * 40 * 2] * 4]


@pytest.mark.parametrize("options", [{}, {"window": (1, 1)}], ids=str)
@pytest.mark.parametrize("name", ["aten", "triton"])
def test_memory_is_in_the_order_of_the_query(options, name):
    """So that heads of (B, L, H, E) are rows of (B, L, H E) again, without a copy."""
    q, k, v = (tensor(2, 3, 4, 2).transpose(1, 2).detach().requires_grad_() for _ in range(3))
    with use_backend(name):
        y = attention(q, k, v, **options)
        grads = torch.autograd.grad(y, (q, k, v), torch.randn_like(y))
        q, k, v = (t.detach().contiguous().requires_grad_() for t in (q, k, v))
        z = attention(q, k, v, **options)
        of_contiguous = torch.autograd.grad(z, (q, k, v), torch.randn_like(z))
    assert all(t.transpose(1, 2).is_contiguous() for t in (y, *grads))
    assert all(t.is_contiguous() for t in (z, *of_contiguous))


@pytest.mark.parametrize(
    ("frozen", "launched"),
    [
        ((), ["_backward_queries", "_backward_keys", "_backward_mask"]),
        ((3,), ["_backward_queries", "_backward_keys"]),
        ((1, 2, 3), ["_backward_queries"]),
        ((0, 1, 2), ["_backward_queries", "_backward_mask"]),
    ],
)
def test_kernels_of_what_is_needed(frozen, launched):
    inputs = [tensor(1, 1, 2, 2) for _ in range(3)] + [tensor(2, 2)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    found = []
    with use_backend("triton"):
        y = attention(*inputs)
        with kernels("launch").observed(lambda kernel, *_: found.append(kernel.__name__)):
            y.backward(torch.ones_like(y))
    assert found == launched
    assert [t.grad is None for t in inputs] == [i in frozen for i in range(4)]


def test_a_head_that_is_too_wide_for_the_kernels():
    widest = kernels("attention").LARGEST[torch.float64]
    inputs = tensor(1, 1, 2, widest + 1), tensor(1, 1, 3, widest + 1), tensor(1, 1, 3, 2)
    found = []
    with use_backend("triton"), kernels("launch").observed(lambda *_: found.append(1)):
        assert_same(inputs)
    assert not found


class TestDropout:
    def test_is_stocks_under_the_same_seed(self, backend):
        inputs = tensor(2, 2, 3, 2), tensor(2, 2, 4, 2), tensor(2, 2, 4, 2)
        results = []
        for function in (attention, F.scaled_dot_product_attention):
            torch.manual_seed(3)
            y = function(*inputs, dropout_p=0.4)
            results.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
        torch.testing.assert_close(*results)

    def test_everything_is_dropped(self, backend):
        q, k, v = (tensor(1, 1, 2, 2) for _ in range(3))
        y = attention(q, k, v, dropout_p=1.0)
        assert not y.count_nonzero()
        assert not any(g.count_nonzero() for g in torch.autograd.grad(y.sum(), (q, k, v)))

    def test_the_share_of_zeros(self, backend):
        q = torch.zeros(1, 1, 200, 1, device=DEVICE)
        y = attention(q, q, torch.ones_like(q), dropout_p=0.25)
        assert abs(y.mean().item() - 1) < 0.02
        torch.testing.assert_close(attention(q, q, q + 1, dropout_p=0.0), q + 1)


Q, K, V = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4)
MASK = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((Q[0, 0, 0], K, V), {}),
        ((Q, K.double(), V), {}),
        ((Q, K, V, MASK.double()), {}),
        ((Q, K, V, MASK.long()), {}),
        ((Q, K, V, MASK[:, :4]), {}),
        ((Q, K, V, MASK[0]), {}),
        ((Q, K, V, MASK.expand(2, 1, 3, 5)), {}),
        ((Q, K, V, MASK.expand(1, 1, 1, 3, 5)), {}),
        ((Q, K.expand(3, 2, 5, 4)[:, :1].expand(3, 3, 5, 4), V), {}),
        ((Q, K[:, :1].expand(1, 3, 5, 4), V[:, :1].expand(1, 3, 5, 4)), {"enable_gqa": True}),
        ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}),
        ((Q, K, V), {"dropout_p": -0.1}),
        ((Q, K, V), {"dropout_p": 1.1}),
        ((Q.long(), K.long(), V.long()), {}),
        (([1.0], K, V), {}),
        ((Q, K, V, [1.0]), {}),
        ((Q, K.to("meta"), V), {}),
        ((Q, K, V, None, 0.0, False, 1.0), {}),
    ],
    ids=range(18),
)
def test_bad_calls_raise_what_stock_raises(args, options, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the type is what is compared
        F.scaled_dot_product_attention(*args, **options)
    with pytest.raises(expected.type):
        attention(*args, **options)


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        # stock's kernel reads past the end of these
        (RuntimeError, (Q, K[..., :3], V), {}),
        (RuntimeError, (Q, K, V[:, :, :4]), {}),
        (RuntimeError, (Q, K, V, MASK.to("meta")), {}),
        (ValueError, (Q, K, V), {"window": 3}),
        (ValueError, (Q, K, V), {"window": (1, 2, 3)}),
        (ValueError, (Q, K, V), {"window": (-1, 2)}),
        (TypeError, (Q, K, V), {"window": (1.5, 2)}),
        (TypeError, (Q, K, V), {"alibi_slopes": 0.5}),
        (RuntimeError, (Q, K, V), {"alibi_slopes": torch.ones(3)}),
        (RuntimeError, (Q, K, V), {"alibi_slopes": torch.ones(2, requires_grad=True)}),
    ],
    ids=range(10),
)
def test_bad_calls(error, args, options, backend):
    with pytest.raises(error, match="scaled_dot_product_attention"):
        attention(*args, **options)


def test_a_mask_and_is_causal_together(backend):
    """Stock's kernel for a CPU takes both; its formula refuses them."""
    inputs = tensor(1, 1, 3, 2), tensor(1, 1, 4, 2), tensor(1, 1, 4, 2), tensor(3, 4)
    causal = torch.ones(3, 4, device=DEVICE).tril().bool()

    def theirs(q, k, v, mask, is_causal):
        return stock(q, k, v, mask.masked_fill(~causal, -math.inf))

    assert_same(inputs, theirs, is_causal=True)


def test_slopes_keep_their_digits_under_autocast(backend):
    """In bfloat16 this one would be off by 0.2 %, and what it does to the farthest key by 3 %."""
    k = torch.zeros(1, 1, 400, 2, device=DEVICE)
    v = k.clone()
    v[0, 0, 0] = 1e3
    slopes = torch.tensor([0.0301], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = attention(k[:, :, :1], k, v, alibi_slopes=slopes)
    P = torch.softmax(-slopes.double() * torch.arange(399, -1, -1, device=DEVICE), 0)
    assert y.dtype == torch.bfloat16
    assert abs(y[0, 0, 0, 0].item() / (P[0].item() * 1e3) - 1) < 0.01


def test_a_query_that_is_not_a_number(backend):
    """Stock's kernel for a CPU gives 0 (seen with torch 2.13), and so ours there."""
    q, k, v = (tensor(1, 1, 3, 2, requires_grad=False) for _ in range(3))
    q[0, 0, 1, 0] = math.nan
    row = attention(q, k, v)[0, 0, 1]
    if backend == "aten":
        assert torch.equal(row, F.scaled_dot_product_attention(q, k, v)[0, 0, 1])
    else:
        assert row.isnan().all()


def test_a_row_that_is_certain_keeps_its_gradient_in_half_precision():
    """dy · y with a y rounded to bfloat16 would be wrong by more than all of it."""
    q, k = torch.tensor([[[[8.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    v, dy = torch.tensor([[[[1.01], [0.3]]]]), torch.tensor([[[[3.0]]]])
    inputs = [t.to(DEVICE, torch.bfloat16).requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with use_backend("triton"):
        grads = torch.autograd.grad(attention(*inputs), inputs, dy.to(DEVICE, torch.bfloat16))
    expected = torch.autograd.grad(stock(*exact), exact, dy.to(DEVICE, torch.float64))
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-2, atol=0)
