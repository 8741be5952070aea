"""Triplet margin and InfoNCE beyond what the op database drives: several chunks and tiles, ties and
zeros, broadcasts, bad calls."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional, nn, use_backend
from custom_backprop.backends import contrastive as primitives
from custom_backprop.backends import interpreting, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.specs.contrastive import info_nce as stock_info_nce


def compare(ours, stock, tensors, *, rtol=1e-9, atol=1e-10):
    """Value and gradients of all tensors, under random weights."""
    found = []
    for function in (ours, stock):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in tensors]
        y = function(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype).to(
            DEVICE
        )
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)


def triplets(function, **options):
    return lambda a, p, n: function(a, p, n, **options)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2, 2.5, math.inf, 0.5])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("shape", [(37, 5), (3, 1025)], ids=str)
def test_triplet_sizes_and_orders(shape, swap, p, backend):
    options = {"p": p, "swap": swap, "margin": 0.7, "reduction": "none"}
    ours, stock = (
        triplets(functional.triplet_margin_loss, **options),
        triplets(F.triplet_margin_loss, **options),
    )
    compare(ours, stock, [normal(*shape) for _ in range(3)])


def test_triplet_in_chunks(monkeypatch, backend):
    """Of a CPU: forward and backward walk in parts, whatever the reduction."""
    monkeypatch.setattr(primitives, "CHUNK", 16)
    for reduction in ("none", "mean", "sum"):
        for swap in (False, True):
            options = {"swap": swap, "margin": 2.0, "reduction": reduction}
            ours, stock = (
                triplets(functional.triplet_margin_loss, **options),
                triplets(F.triplet_margin_loss, **options),
            )
            compare(ours, stock, [normal(3, 3, 5) for _ in range(3)])


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 1), (4, 3), (1, 3)),
        ((1, 1), (4, 1), (4, 3)),
        ((4, 3), (1, 1), (1, 1)),
        ((2, 1, 3), (1, 5, 3), (2, 5, 1)),
        ((), (), ()),
        ((2, 0), (2, 0), (2, 0)),
        ((2, 1), (2, 0), (2, 1)),
        ((2, 1), (2, 1), (2, 0)),
        ((0, 1), (1, 1), (0, 3)),
        ((0, 3), (0, 3), (1, 3)),
        ((4, 1), (4, 3), (4, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("swap", [False, True])
def test_triplet_broadcasts_as_stock(swap, shapes, backend):
    options = {"swap": swap, "margin": 3.0, "reduction": "none"}
    ours, stock = (
        triplets(functional.triplet_margin_loss, **options),
        triplets(F.triplet_margin_loss, **options),
    )
    compare(ours, stock, [normal(*shape) for shape in shapes])


@pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason="kernels do not run here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.5, 3, 7.5])
def test_triplet_of_any_p_is_as_near_as_stocks_in_half_precision(p, dtype, monkeypatch):
    """The kernel takes logarithms and exponentials of half precision; so it shall in the
    interpreter, which has copies of bfloat16 in float32."""
    if interpreting():
        monkeypatch.setattr(kernels("contrastive"), "half", lambda X: True)
    given = [normal(40, 33).to(DEVICE, dtype) for _ in range(3)]

    def found(module, of):
        leaves = [t.to(of).requires_grad_() for t in given]
        loss = module.triplet_margin_loss(*leaves, p=p, margin=9.0, swap=True, reduction="none")
        return [t.double() for t in (loss, *torch.autograd.grad(loss.sum(), leaves))]

    truth, theirs = found(F, torch.float64), found(F, dtype)
    with use_backend("triton"):
        ours = found(functional, dtype)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert (our - true).norm() <= 1.05 * (their - true).norm()


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_triplet_at_kinks_and_ties(p, backend):
    """Distances of 0, a negative as near as the positive, components that tie, a hinge of exactly
    0."""
    a = torch.zeros(5, 2, dtype=torch.float64)
    p_ = torch.tensor([[0.0, 0], [1, 1], [1, 0], [2, -2], [0, 0]], dtype=torch.float64)
    n = torch.tensor([[0.0, 0], [1, 1], [0, 1], [-2, 2], [1, 0]], dtype=torch.float64)
    zero = torch.zeros((), requires_grad=True)
    zero.clamp_min(0).backward()
    # a hinge of exactly 0 has the slope 1 here, as in stock before torch 2.14, which takes 0: both
    # are subgradients
    if not zero.grad:
        a, p_, n = a[:-1], p_[:-1], n[:-1]
    for swap in (False, True):
        options = {"p": p, "swap": swap, "eps": 0.0, "reduction": "none"}
        compare(
            triplets(functional.triplet_margin_loss, **options),
            triplets(F.triplet_margin_loss, **options),
            [a, p_, n],
        )


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_triplets_of_other_dimensions_are_refused_as_by_stock(which, shape):
    given = [normal(2, 3) for _ in range(3)]
    given[which] = normal(*shape)
    for function in (F.triplet_margin_loss, functional.triplet_margin_loss):
        with pytest.raises(RuntimeError, match="dimensions"):
            function(*given)


def test_triplet_norm_of_no_order_is_stocks(backend):
    options = {"p": -1.0, "reduction": "sum"}
    compare(
        triplets(functional.triplet_margin_loss, **options),
        triplets(F.triplet_margin_loss, **options),
        [normal(3, 2) for _ in range(3)],
    )


def test_triplets_of_integers_are_stocks(backend):
    given = [torch.arange(6).view(2, 3) * k for k in (1, 2, 3)]
    assert torch.equal(functional.triplet_margin_loss(*given), F.triplet_margin_loss(*given))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 3), (70, 40)])
@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"symmetric": True, "reduction": "none"}, {"normalize": False}],
    ids=str,
)
def test_info_nce_sizes(rows, width, options, backend):
    compare(
        lambda *t: functional.info_nce(*t, **options),
        lambda *t: stock_info_nce(*t, **options),
        [normal(rows, width), normal(rows, width)],
    )


@pytest.mark.parametrize("negatives", [(1, 3), (70, 3), (5, 4, 3), (0, 3)], ids=str)
def test_info_nce_negatives(negatives, backend):
    compare(functional.info_nce, stock_info_nce, [normal(5, 3), normal(5, 3), normal(*negatives)])


def test_info_nce_in_chunks(monkeypatch, backend):
    monkeypatch.setattr(primitives, "SIMILARITIES", 16)
    compare(functional.info_nce, stock_info_nce, [normal(9, 3), normal(9, 3)])
    compare(functional.info_nce, stock_info_nce, [normal(9, 3), normal(9, 3), normal(9, 2, 3)])


def test_info_nce_rows_longer_than_a_block(backend):
    compare(
        functional.info_nce, stock_info_nce, [normal(2, 1030), normal(2, 1030), normal(3, 1030)]
    )
    compare(functional.info_nce, stock_info_nce, [normal(2, 3), normal(2, 3), normal(1100, 3)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_of_great_logits(symmetric, backend):
    """Logits of 1e4: the statistics of a row are its largest and the rest, whose sum would lose
    what the loss is made of."""
    q, k = 100 * torch.randn(6, 4), 100 * torch.randn(6, 4)
    options = {"temperature": 1.0, "normalize": False, "symmetric": symmetric}
    exact = stock_info_nce(q.double(), k.double(), **options)
    torch.testing.assert_close(
        functional.info_nce(q.to(DEVICE), k.to(DEVICE), **options).double().cpu(),
        exact,
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_of_no_rows(symmetric, backend):
    q = torch.randn(0, 3, requires_grad=True)
    loss = functional.info_nce(q, torch.randn(0, 3), symmetric=symmetric, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, q)[0].shape == q.shape


def test_info_nce_of_a_zero_vector(backend):
    """It has no direction: divided by 1e-12, as stock's normalize does it, and finite."""
    q = normal(3, 2)
    q[1] = 0
    compare(functional.info_nce, stock_info_nce, [q, normal(3, 2)], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("length", [0.5e-12, 0.999e-12, 1.001e-12])
def test_info_nce_of_a_vector_about_as_long_as_1e_12(length, backend):
    """A shorter one is divided by a constant, whose gradient has no part along the vector."""
    q = normal(3, 2)
    q[1] = torch.tensor([0.6, 0.8]) * length
    compare(functional.info_nce, stock_info_nce, [q, normal(3, 2)], rtol=1e-6, atol=1e-6)


def test_info_nce_keeps_one_number_a_pair():
    """Nothing of the size of the similarities is saved but G."""
    saved = []
    q, k = torch.randn(40, 3, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.info_nce(q, k)
    assert sum(t.numel() >= 40 * 40 for t in saved) == 1


def test_info_nce_modules_repr():
    assert (
        repr(nn.InfoNCELoss(0.5))
        == "InfoNCELoss(temperature=0.5, symmetric=False, normalize=True, reduction='mean')"
    )


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((X, X, X), {"margin": 0}),
        ((X, X, X), {"margin": -1.0}),
        ((X, X, X), {"reduction": "average"}),
        ((X, X, torch.ones(3)), {}),
        ((X, X, torch.ones(4, 3)), {}),
        ((X, X, None), {}),
        ((X, X), {}),
    ],
)
def test_bad_triplets_raise_what_stock_raises(args, options, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the type is what is compared
        F.triplet_margin_loss(*args, **options)
    with pytest.raises(expected.type):
        functional.triplet_margin_loss(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, X), {"temperature": 0.0}, ValueError, "temperature"),
        ((X, X), {"temperature": math.nan}, ValueError, "temperature"),
        ((X, X), {"temperature": math.inf}, ValueError, "temperature"),
        ((X, X), {"reduction": "average"}, ValueError, "average"),
        ((X, X, X), {"symmetric": True}, ValueError, "symmetric"),
        ((X, X[:1]), {}, RuntimeError, r"\(2, 3\), \(1, 3\)"),
        ((X[0], X[0]), {}, RuntimeError, "one shape"),
        ((X, X, X[0]), {}, RuntimeError, "negatives"),
        ((X, X, X[:, :2]), {}, RuntimeError, "negatives"),
        ((X, X, torch.ones(3, 1, 3)), {}, RuntimeError, "negatives"),
        ((X.long(), X), {}, RuntimeError, "int64"),
        ((X, None), {}, TypeError, "NoneType"),
    ],
)
def test_bad_info_nce(args, options, error, message, backend):
    with pytest.raises(error, match=message):
        functional.info_nce(*args, **options)


def test_the_maximum_norm_keeps_a_nan(backend):
    """In the maximum of a row a NaN is easily passed over."""
    a = torch.tensor([[float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0]], device=DEVICE, requires_grad=True)
    p, n = torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    ours, theirs = (
        m.triplet_margin_loss(a, p, n, p=float("inf"), reduction="none")
        for m in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_temperature_that_is_learned(backend):
    """CLIP's: the gradient of τ is that of a similarity divided by it."""
    q, k = (
        torch.randn(5, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)
    )
    tau = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ours = functional.info_nce(q, k, temperature=tau)
    s = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(k, dim=1).T / tau
    theirs = torch.nn.functional.cross_entropy(s, torch.arange(5, device=DEVICE))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, (q, k, tau)) for y in (ours, theirs)))


def test_info_nce_compiled_for_several_shapes_and_temperatures():
    torch._dynamo.reset()
    loss = torch.compile(functional.info_nce, fullgraph=True, backend="aot_eager")
    for rows, temperature in ((4, 0.5), (6, 0.4), (8, 0.3)):
        q, k = torch.randn(rows, 3, device=DEVICE), torch.randn(rows, 3, device=DEVICE)
        torch.testing.assert_close(
            loss(q, k, temperature=temperature), functional.info_nce(q, k, temperature=temperature)
        )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature must be greater than 0 and finite"):
        nn.InfoNCELoss(temperature)
    with pytest.raises(ValueError, match="temperature must be greater than 0 and finite"):
        functional.info_nce(torch.ones(2, 2), torch.ones(2, 2), temperature=temperature)
