"""Attention beyond what the op database drives: shapes, tiles of the band, rows that attend to
nothing, what is saved, layouts, dropout, bad calls, and bugs of others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch.utils.checkpoint import checkpoint

from custom_backprop import functional
from custom_backprop.backends import attention as primitives
from custom_backprop.backends import use_backend
from custom_backprop.backends.kernels import kernels
from custom_backprop.formulas.dropout import kept as kept_by_dropout
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
    P = 0.3

    def noise(self, q, k, mask=None, p=P, **options):
        """What P was multiplied by: the identity as the values gives P back, 0 / 0 where P is 0."""
        S = k.shape[2]
        v = torch.eye(S, dtype=q.dtype, device=DEVICE).expand(*k.shape[:2], S, S)
        with torch.no_grad():
            y, without = (attention(q, k, v, mask, d, **options) for d in (p, 0.0))
        return y / without

    @pytest.mark.parametrize("bound", [False, True])
    def test_gradients_have_the_noise_of_the_output(self, bound, backend, monkeypatch):
        """Over several tiles and chunks, none of them full; alone, and with all else."""
        monkeypatch.setattr(primitives, "CHUNK", 500)
        q, k, v = tensor(2, 4, 37, 3), tensor(2, 2, 45, 3), tensor(2, 2, 45, 2)
        inputs, options = [q, k, v], {"enable_gqa": True}
        if bound:
            inputs.append(tensor(1, 4, 37, 45))
            slopes = torch.rand(4, device=DEVICE, dtype=torch.float64)
            options |= {"window": (22, 14), "alibi_slopes": slopes, "is_causal": True}
        options["seed"] = torch.tensor(2**40 + 3, device=DEVICE)
        noise = self.noise(q, k, *inputs[3:], **options)
        met = noise[~noise.isnan()]
        torch.testing.assert_close(met, (met != 0).double() / (1 - self.P), rtol=1e-9, atol=0)
        assert 0 < met.count_nonzero() < met.numel()
        expected = self.expected(inputs, noise.nan_to_num(), options)
        y = attention(*inputs, dropout_p=self.P, **options)
        found = y, *torch.autograd.grad(y, inputs, torch.ones_like(y))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    def expected(self, inputs, noise, options):
        """(P n) v and its gradients, by autograd."""
        q, k, v, *mask = inputs
        S = k.shape[2]
        one = torch.eye(S, dtype=q.dtype, device=DEVICE).expand(*k.shape[:2], S, S)
        P = stock(q, k, one, *mask, **{n: o for n, o in options.items() if n != "seed"})
        y = (P * noise) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))

    @pytest.mark.parametrize("S", [16, 21])
    def test_one_noise_on_every_backend(self, S, backend, monkeypatch):
        """Word ((b H + h) L + i) 4⌈S / 4⌉ + j, whatever the chunks and the band of keys."""
        monkeypatch.setattr(primitives, "CHUNK", 300)
        q, k = (tensor(2, 3, n, 2, requires_grad=False) for n in (18, S))
        seed, columns = torch.tensor(-7, device=DEVICE), S + -S % 4
        kept = kept_by_dropout(seed, 2 * 3 * 18 * columns, self.P).view(2, 3, 18, columns)[..., :S]
        assert torch.equal(self.noise(q, k, seed=seed) != 0, kept)
        noise = self.noise(q, k, seed=seed, window=(3, 2))
        assert 0 < noise.isnan().sum() < noise.numel()
        assert torch.equal((noise != 0) | noise.isnan(), kept | noise.isnan())

    def test_statistics(self, backend):
        """The share that is kept, and that no noise follows that of the next column, row, head,
        batch or call. The bounds are five standard deviations."""
        q = torch.zeros(2, 3, 40, 1, device=DEVICE)
        one, two = (
            ((self.noise(q, q) != 0).double() - (1 - self.P)) / (self.P * (1 - self.P)) ** 0.5
            for _ in range(2)
        )
        bound = 5 / one.numel() ** 0.5
        assert abs(one.mean()) < bound
        for a, b in [(one, two)] + [
            (one.narrow(d, 1, one.shape[d] - 1), one.narrow(d, 0, one.shape[d] - 1))
            for d in range(4)
        ]:
            assert abs((a * b).mean()) < 1.5 * bound

    def test_nothing_or_everything_is_dropped(self, backend):
        """As stock has it: 1 gives zeros, and NaN of an infinite value; 0 draws nothing."""
        q, k, v = (tensor(1, 1, 2, 2) for _ in range(3))
        y = attention(q, k, v, dropout_p=1.0)
        assert not y.count_nonzero()
        assert not any(g.count_nonzero() for g in torch.autograd.grad(y.sum(), (q, k, v)))
        before = torch.random.get_rng_state()
        seed = torch.tensor(3, device=DEVICE)
        assert torch.equal(attention(q, k, v, dropout_p=0.0, seed=seed), attention(q, k, v))
        assert torch.equal(torch.random.get_rng_state(), before)
        infinite = torch.full_like(v, math.inf)
        for function in (attention, F.scaled_dot_product_attention):
            assert function(q, k, infinite, dropout_p=1.0).isnan().all()

    def test_noise_is_that_of_torchs_generator(self, backend):
        q = tensor(1, 2, 9, 2)
        torch.manual_seed(3)
        first, second = (attention(q, q, q, dropout_p=self.P) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(attention(q, q, q, dropout_p=self.P), first)

        def call(t):
            return attention(t, t, t, dropout_p=self.P)

        torch.manual_seed(3)
        y = checkpoint(call, q, use_reentrant=False)
        torch.rand(5, device=DEVICE)  # moves the generator on
        grads = [torch.autograd.grad(out.sum(), q)[0] for out in (y, first)]
        assert torch.equal(*grads)

    def test_only_the_seed_is_saved_of_it(self, backend):
        kept = []
        q = tensor(1, 1, 40, 2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            attention(q, q, q, dropout_p=self.P)
        assert sorted(t.numel() for t in kept) == [1, 40, *[80] * 4]

    @pytest.mark.parametrize("gradient", [False, True])
    def test_randomness_of_vmap(self, gradient, backend):
        q = torch.zeros(3, 1, 8, 4, device=DEVICE)
        one = torch.eye(8, device=DEVICE).expand(3, 1, 8, 8)

        def f(q, v):
            return attention(q, q, v, dropout_p=self.P)

        if gradient:
            f = torch.func.grad(lambda q, v: attention(q, q, v, dropout_p=self.P).sum(), 1)
        same = torch.vmap(f, randomness="same")(q, one)
        assert torch.equal(same, same[:1].expand_as(same))
        different = torch.vmap(f, randomness="different")(q, one)
        assert all(not torch.equal(different[0], row) for row in different[1:])
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(f)(q, one)
        seeds = torch.arange(3, device=DEVICE)
        given = torch.vmap(lambda q, v, s: attention(q, q, v, dropout_p=self.P, seed=s))
        rows = [
            attention(a, a, b, dropout_p=self.P, seed=s)
            for a, b, s in zip(q, one, seeds, strict=True)
        ]
        torch.testing.assert_close(given(q, one, seeds), torch.stack(rows))

    def test_compiled(self, backend):
        """Other zeros at each call, which backward has too."""
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        v = torch.eye(8, dtype=torch.float64, device=DEVICE)[None, None].requires_grad_()
        q, k = torch.zeros(2, 1, 1, 8, 4, dtype=torch.float64, device=DEVICE)
        ys = [compiled(q, k, v, dropout_p=self.P) for _ in range(2)]
        assert not torch.equal(*ys)
        for y in ys:
            (dv,) = torch.autograd.grad(y.sum(), v)
            torch.testing.assert_close(dv, y.sum(2).unsqueeze(3).expand_as(v).detach())


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
        (RuntimeError, (Q, K, V), {"seed": torch.tensor(1.0)}),
        (RuntimeError, (Q, K, V), {"seed": torch.tensor([1, 2])}),
    ],
    ids=range(12),
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


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("stride", [(0, 1), (1, 1), (1, 0)], ids=str)
def test_rows_that_lie_in_one_place(which, stride, backend):
    """An expanded query or value, or windows of one signal. torch's CPU kernel (2.13) writes its
    results in the strides of what it gets, one over the other, and leaves memory that it never
    wrote in the others."""
    given = [torch.randn(1, 2, 3, 4, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    given[which] = torch.randn(26, dtype=torch.float64, device=DEVICE).as_strided(
        (1, 2, 3, 4), (20, 10, *stride)
    )
    dy = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=DEVICE)
    found = []
    for tensors in (given, [t.clone(memory_format=torch.contiguous_format) for t in given]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = functional.scaled_dot_product_attention(*leaves)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
