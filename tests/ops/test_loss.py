"""The pointwise losses against stock: every reduction and argument, errors and warnings, extremes,
and gradients held since forward."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as stock
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_backprop import functional, use_backend
from custom_backprop.backends import BACKENDS, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.formulas.loss import LOSSES

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(size_average and reduce|'batchmean' divides|different to the input size)"
)

HERE = [b for b in BACKENDS if why_not(b, DEVICE) is None]
REDUCTIONS = ("none", "mean", "sum")
PROBABILITIES = {
    "binary_cross_entropy": "both",
    "binary_cross_entropy_with_logits": "target",
    "kl_div": "target",
}


def inputs(name, *shape, dtype=torch.float64):
    """Valid inputs that require grad: input, target and, for the Gaussian, variance."""
    kind = PROBABILITIES.get(name)
    x = (
        torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01
        if kind == "both"
        else torch.randn(shape, dtype=torch.float64)
    )
    t = (
        torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01
        if kind
        else torch.randn(shape, dtype=torch.float64)
    )
    t = 3 * t.abs() if name == "poisson_nll_loss" else t
    more = [torch.rand(shape, dtype=torch.float64) + 0.1] if name == "gaussian_nll_loss" else []
    return [a.to(DEVICE, dtype).requires_grad_() for a in (x, t, *more)]


def agree(name, args, kwargs=None, dy=None, rtol=1e-10, atol=1e-12, wide=None):
    """Ours against stock, value and gradients, under the gradient ``dy`` (random if None); stock's
    inputs are cast to ``wide``."""
    kwargs = kwargs or {}
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    cast = [a.to(wide) for a in args] if wide else args
    ours, theirs = getattr(functional, name)(*args, **kwargs), getattr(stock, name)(*cast, **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    dy = torch.randn_like(theirs) if dy is None else torch.full_like(theirs, dy)
    grads, expected = torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy)
    torch.testing.assert_close(grads, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("bound", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("name", ["smooth_l1_loss", "huber_loss"])
def test_a_bound_that_float32_does_not_hold(name, bound, backend):
    """Of float64, at the bound, next to it, and between it and its rounded twin (triton before 3.9
    compares with that)."""
    at = torch.tensor([bound, -bound], dtype=torch.float64)
    twin = at.float().double()
    x = (
        torch.cat([at, at.nextafter(at * 2), at.nextafter(at * 0), (at + twin) / 2, twin])
        .to(DEVICE)
        .requires_grad_()
    )
    agree(
        name,
        [x, torch.zeros_like(x)],
        {"reduction": "none", "beta" if name == "smooth_l1_loss" else "delta": bound},
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_every_reduction_and_gradient_of_the_loss(name, backend):
    for reduction, dy in itertools.product(REDUCTIONS, (1.0, 0.37, 0.0, None)):
        agree(name, inputs(name, 3, 5), {"reduction": reduction}, dy)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("smooth_l1_loss", {"beta": 0.3}),
        ("smooth_l1_loss", {"beta": 0}),
        ("huber_loss", {"delta": 0.4}),
        ("kl_div", {"log_target": True, "reduction": "batchmean"}),
        ("gaussian_nll_loss", {"full": True, "eps": 0.5}),
        ("poisson_nll_loss", {"full": True}),
        (
            "binary_cross_entropy_with_logits",
            {"pos_weight": torch.tensor([0.5, 2.0, 3.0, 1.0, 7.0], dtype=torch.float64)},
        ),
        (
            "binary_cross_entropy_with_logits",
            {"weight": torch.rand(3, 1, dtype=torch.float64), "reduction": "sum"},
        ),
        ("binary_cross_entropy", {"weight": torch.rand(5, dtype=torch.float64)}),
    ],
)
def test_arguments(name, arguments, backend):
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    agree(name, inputs(name, 3, 5), arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_poisson_of_a_rate(reduction, backend):
    x, t = torch.rand(2, 7, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64) * 5
    args = [a.to(DEVICE).requires_grad_() for a in (x, t)]
    agree(
        "poisson_nll_loss",
        args,
        {"log_input": False, "full": True, "eps": 0.1, "reduction": reduction},
    )


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_a_weight_is_differentiated(name, backend):
    for reduction in REDUCTIONS:
        x, t, w = inputs("gaussian_nll_loss", 3, 5)
        leaves = (x, t, w)
        ours, theirs = (
            getattr(m, name)(x, t, reduction=reduction, weight=w) for m in (functional, stock)
        )
        dy = torch.randn_like(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, dy),
            torch.autograd.grad(theirs, leaves, dy),
            rtol=1e-10,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    ("name", "n"),
    [*itertools.product(LOSSES, (1, 2049)), ("mse_loss", 70001), ("gaussian_nll_loss", 70001)],
)
def test_sizes_that_no_block_divides(name, n, backend):
    """At 70001 a program of the kernel that sums walks several blocks."""
    for reduction in ("mean", "none") if n < 70001 else ("mean",):
        agree(name, inputs(name, n), {"reduction": reduction})


@pytest.mark.parametrize("name", LOSSES)
def test_more_than_a_chunk(name):
    """What the CPU walks through in chunks, in one piece of memory, transposed, and with a last
    chunk that is not full."""
    for transpose in (False, True):
        args = [
            a.detach().t().requires_grad_() if transpose else a for a in inputs(name, 1031, 521)
        ]
        for reduction in ("mean", "none"):
            agree(name, args, {"reduction": reduction})


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(2**15,), (2**15 + 1,), (257, 128), (4099, 512)])
def test_mse_by_the_norms_of_rows(shape, dtype, rtol):
    """What is read once: sizes of whole rows, in one chunk and in several, and one element more,
    which goes the other way."""
    for reduction, layout in itertools.product(("mean", "sum"), ("contiguous", "transposed")):
        x, t = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        x[..., 0] = 1e3  # rows of another size than their neighbours
        if layout == "transposed":
            x, t = x.t(), t.t()
        agree(
            "mse_loss",
            [x.requires_grad_(), t.requires_grad_()],
            {"reduction": reduction},
            rtol=rtol,
        )


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e-14, 1e-6, 1e6, 1e15, 3e18])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_whose_gradients_squares_are_too_small_or_too_large(scale, reduction):
    x = torch.randn(300, 128, device=DEVICE) * scale
    t = torch.zeros_like(x)
    truth = stock.mse_loss(x.double(), t.double(), reduction=reduction).item()
    theirs = stock.mse_loss(x, t, reduction=reduction).item()
    ours = functional.mse_loss(x.requires_grad_(), t, reduction=reduction).item()
    if math.isinf(theirs):  # a sum that float32 cannot hold; its mean may be held, by us
        assert math.isinf(ours) or (reduction == "mean" and ours == pytest.approx(truth, rel=1e-6))
    else:
        assert abs(ours - truth) <= abs(theirs - truth) + 2e-7 * truth


def test_mse_that_float32_holds_though_not_four_times_it():
    x = torch.zeros(300, 128, device=DEVICE)
    x[7, 5] = 1.5e19
    assert functional.mse_loss(
        x.requires_grad_(), torch.zeros_like(x), reduction="sum"
    ).item() == pytest.approx(2.25e38, rel=1e-6)


def test_the_sum_of_a_million_is_as_exact_as_stock():
    for x in (torch.full((1024, 1024), 0.1, device=DEVICE), torch.rand(1024, 1024, device=DEVICE)):
        t = torch.zeros_like(x)
        truth = stock.mse_loss(x.double(), t.double())
        x.requires_grad_()  # so that ours walks in chunks, or blocks, and holds the gradient
        ours, theirs = (
            (m.mse_loss(x, t).detach().double() / truth - 1).abs().item()
            for m in (functional, stock)
        )
        assert ours <= theirs + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_input(name, backend):
    agree(name, inputs(name, 0, 3), {"reduction": "mean"}, dy=1.0)
    agree(name, inputs(name, 0, 3), {"reduction": "sum"}, dy=1.0)
    assert getattr(functional, name)(*inputs(name, 0, 3), reduction="mean").isnan()
    assert getattr(functional, name)(*inputs(name, 0, 3), reduction="none").shape == (0, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_held_since_forward(name, backend):
    """With and without retain_graph the same bits; what is done to the first gradient does not
    reach the second."""
    for dtype, value in itertools.product((torch.float32, torch.bfloat16), (1.0, 0.37)):
        args = inputs(name, 5, 7, dtype=dtype)
        dy = torch.tensor(value, dtype=dtype, device=DEVICE)
        loss = getattr(functional, name)(*args)
        first = torch.autograd.grad(loss, args, dy, retain_graph=True)
        copies = [g.clone() for g in first]
        for g in first:
            g.mul_(3)
        second = torch.autograd.grad(loss, args, dy, retain_graph=True)
        last = torch.autograd.grad(loss, args, dy)
        for a, b, c in zip(copies, second, last, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_many_gradients_at_once_through_a_graph_that_is_freed(backend):
    dys = torch.randn(4, dtype=torch.float64, device=DEVICE)
    x, t = inputs("mse_loss", 3)
    single = [torch.autograd.grad(functional.mse_loss(x, t), (x, t), d) for d in dys]
    expected = [torch.stack(g) for g in zip(*single, strict=True)]
    legacy = torch.autograd.grad(functional.mse_loss(x, t), (x, t), dys, is_grads_batched=True)
    loss = functional.mse_loss(x, t)
    mapped = torch.vmap(lambda d: torch.autograd.grad(loss, (x, t), d))(dys)
    for got in (legacy, mapped):
        torch.testing.assert_close(list(got), expected)


def test_without_reduction_each_element_has_its_own_gradient(backend):
    for name in LOSSES:
        args = inputs(name, 4, 6)
        dy = torch.randn(6, 4, dtype=torch.float64, device=DEVICE).t()
        grads = torch.autograd.grad(getattr(functional, name)(*args, reduction="none"), args, dy)
        expected = torch.autograd.grad(getattr(stock, name)(*args, reduction="none"), args, dy)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_a_hundred(dtype, backend):
    logits = torch.tensor([-100.0, -40.0, 0.0, 40.0, 100.0], dtype=dtype, device=DEVICE).repeat(2)
    t = torch.tensor([0.0, 1.0], dtype=dtype, device=DEVICE).repeat_interleave(5)
    x = logits.clone().requires_grad_()
    loss = functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    exact = x.detach().double()
    truth = torch.where(
        t == 1, -torch.nn.functional.logsigmoid(exact), -torch.nn.functional.logsigmoid(-exact)
    )
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(
        loss.double(),
        truth,
        rtol=rtol,
        atol=torch.finfo(dtype).tiny if dtype != torch.float16 else 6e-8,
    )
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(dx.double(), exact.sigmoid() - t.double(), rtol=rtol, atol=1e-7)


def test_sure_probabilities(backend):
    """Logarithms stop at -100, and denominators at 1e-12, as in stock."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], device=DEVICE, requires_grad=True)
    t = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5], device=DEVICE, requires_grad=True)
    agree("binary_cross_entropy", (x, t), {"reduction": "none"}, dy=1.0, rtol=1e-6)


def test_at_the_edge_of_a_logarithm_gradients_are_limits_where_stock_gives_nan(backend):
    """Stock's composed gradients there are 0/0 and 0 · ∞."""
    x = torch.tensor([-0.5], dtype=torch.float64, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for name, arguments, slope in (
        ("kl_div", {}, -torch.inf),
        ("poisson_nll_loss", {"full": True}, 0.5),
    ):
        (ours,) = torch.autograd.grad(
            getattr(functional, name)(x, zero, reduction="sum", **arguments), zero
        )
        (theirs,) = torch.autograd.grad(
            getattr(stock, name)(x, zero, reduction="sum", **arguments), zero
        )
        assert ours.item() == slope
        assert theirs.isnan()


def test_the_clamp_of_the_variance_is_not_differentiated(backend):
    x, t, _ = inputs("gaussian_nll_loss", 4)
    v = torch.tensor([0.0, 1e-9, 0.3, 2.0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    agree("gaussian_nll_loss", (x, t, v), {"eps": 0.1})
    assert (
        torch.autograd.grad(functional.gaussian_nll_loss(x, t, v, eps=0.1), v)[0].count_nonzero()
        == 4
    )
    seconds = []
    for module in (functional, stock):
        (dv,) = torch.autograd.grad(
            module.gaussian_nll_loss(x, t, v, eps=0.1), v, create_graph=True
        )
        seconds.append(torch.autograd.grad(dv.square().sum(), (x, t, v)))
    torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [(4, 3), (4,), (4, 1), (1, 3), (3,), (2, 3), (4, 2), (0, 3), (2, 4, 3), (1, 4, 3), ()],
    ids=str,
)
def test_sizes_of_a_variance_are_stocks(shape, backend):
    x, t = inputs("gaussian_nll_loss", 4, 3)[:2]
    v = (torch.rand(shape, dtype=torch.float64, device=DEVICE) + 0.5).requires_grad_()
    try:
        stock.gaussian_nll_loss(x, t, v)
    except ValueError:
        with pytest.raises(ValueError, match="incorrect size"):
            functional.gaussian_nll_loss(x, t, v)
    else:
        agree("gaussian_nll_loss", [x, t, v], {"reduction": "none"})


def test_half_precision_does_not_underflow_in_a_mean(backend):
    """2 d / n is below float16's smallest number; times the factor of a gradient scaler it is
    not."""
    n = 40000
    x = torch.full((n,), 0.01, dtype=torch.float16, device=DEVICE, requires_grad=True)
    t = torch.zeros(n, dtype=torch.float16, device=DEVICE)
    scale = torch.tensor(32768.0, dtype=torch.float16, device=DEVICE)
    (dx,) = torch.autograd.grad(functional.mse_loss(x, t), x, scale)
    truth = 2 * x.detach().double() / n * 32768
    torch.testing.assert_close(dx.double(), truth, rtol=torch.finfo(torch.float16).eps, atol=0)


@pytest.mark.parametrize(
    "given",
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.int64)],
)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "poisson_nll_loss"])
def test_dtypes_meet_in_the_wider_one(name, given, backend):
    x = torch.randn(3, 4, device=DEVICE).to(given[0]).requires_grad_()
    t = (3 * torch.rand(3, 4, device=DEVICE)).to(given[1])
    agree(
        name,
        (x, t),
        rtol=max(torch.finfo(given[0]).eps, 1e-6),
        atol=1e-12,
        wide=torch.promote_types(*given),
    )


def test_what_is_not_floating_point_gives_what_stock_gives(backend):
    x, t = torch.randint(5, (3, 4), device=DEVICE), torch.randint(5, (3, 4), device=DEVICE)
    assert torch.equal(
        functional.l1_loss(x, t, reduction="sum"), stock.l1_loss(x, t, reduction="sum")
    )
    same_error(NotImplementedError, "mse_loss", x, t)
    same_error(RuntimeError, "kl_div", x, t, reduction="sum")
    z = torch.randn(3, dtype=torch.complex64, device=DEVICE)
    assert torch.equal(functional.l1_loss(z, z.conj()), stock.l1_loss(z, z.conj()))


def same_error(error, name, *args, **kwargs):
    for module in (stock, functional):
        with pytest.raises(error):
            getattr(module, name)(*args, **kwargs)


@pytest.mark.parametrize("name", LOSSES)
def test_errors_are_those_of_stock(name, backend):
    args = [a.detach() for a in inputs(name, 3, 4)]
    same_error(ValueError, name, *args, reduction="total")
    mismatch = ValueError if name.startswith("binary") else RuntimeError
    same_error(mismatch, name, args[0], args[1][:2], *args[2:])


def test_errors_of_arguments(backend):
    x, t = (a.detach() for a in inputs("binary_cross_entropy", 3, 4))
    same_error(RuntimeError, "smooth_l1_loss", x, t, beta=-1.0)
    same_error(RuntimeError, "huber_loss", x, t, delta=0.0)
    same_error(ValueError, "mse_loss", x, t, weight=x[0])
    same_error(ValueError, "l1_loss", x, t, weight=x, reduction="elementwise_mean")
    if DEVICE == "cpu" or backend != "triton":  # kernels on a GPU give NaN: tests/ops/test_gpu.py
        same_error(ValueError, "gaussian_nll_loss", x, t, -x)
    same_error(ValueError, "gaussian_nll_loss", x, t, -1.0)
    same_error(ValueError, "gaussian_nll_loss", x, t, x[:, :2])
    same_error(RuntimeError, "binary_cross_entropy", x, t.float())
    for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
        same_error(RuntimeError, name, x, t, torch.rand(5, dtype=x.dtype, device=DEVICE))
        same_error(RuntimeError, name, x.requires_grad_(), t, torch.rand_like(x).requires_grad_())
    same_error(
        RuntimeError,
        "binary_cross_entropy_with_logits",
        x,
        t,
        pos_weight=torch.rand_like(x).requires_grad_(),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU stock aborts the process; ours gives NaN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_no_probability(bad, dtype, backend):
    x, t = (a.detach() for a in inputs("binary_cross_entropy", 3, dtype=dtype))
    off = torch.tensor([0.5, bad, 0.5], dtype=dtype)
    same_error(RuntimeError, "binary_cross_entropy", off, t)
    same_error(RuntimeError, "binary_cross_entropy", x, off)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        functional.binary_cross_entropy(off, t, torch.ones_like(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("by", [b for b in HERE if b != "aten"])
def test_no_probability_is_nan_where_nobody_looks(by, bad, dtype):
    """On a GPU, where ATen's own kernel would stop it; on a CPU ``functional`` has looked
    before."""
    x = torch.tensor([0.5, bad, 0.5], dtype=dtype, device=DEVICE)
    run = (
        LOSSES["binary_cross_entropy"].forward
        if by == "formula"
        else partial(kernels("loss").forward, "binary_cross_entropy")
    )
    for reduction, expected in ((0, [False, True, False]), (1, True), (2, True)):
        assert (
            run(x, torch.full_like(x, 0.3), None, None, reduction, False)[0].isnan().tolist()
            == expected
        )


def warned(module, name, args, kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(module, name)(*args, **kwargs)
    return [(w.category, w.filename == __file__) for w in caught]


@pytest.mark.parametrize(
    "name", [n for n in LOSSES if n not in ("huber_loss", "gaussian_nll_loss")]
)
def test_the_deprecated_arguments(name):
    args = inputs(name, 2, 3)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is not None or reduce is not None:
            agree(name, args, {"size_average": size_average, "reduce": reduce})
    ours, theirs = (warned(m, name, args, {"reduce": False}) for m in (functional, stock))
    assert [c for c, _ in ours] == [c for c, _ in theirs] == [UserWarning]


def test_warnings_are_those_of_stock_and_point_at_the_caller():
    wide, thin = torch.rand(3, 4), torch.rand(1, 4)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        assert (
            warned(functional, name, (wide, thin), {})
            == warned(stock, name, (wide, thin), {})
            == [(UserWarning, True)]
        )
        assert warned(functional, name, (thin, wide), {}) == [(UserWarning, True)]
    assert (
        warned(functional, "kl_div", (wide, wide), {})
        == warned(stock, "kl_div", (wide, wide), {})
        == [(UserWarning, True)]
    )
    for name in ("kl_div", "poisson_nll_loss"):
        assert warned(functional, name, (wide, thin), {"reduction": "sum"}) == []


SHAPES = [
    ((3, 1), (4,)),
    ((2, 3), (2, 3)),
    ((), (5,)),
    ((2, 1, 3), (1, 4, 1)),
    ((7,), ()),
    ((0, 2), (1, 2)),
]


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["mse_loss", "l1_loss", "huber_loss", "kl_div", "poisson_nll_loss"]),
    st.sampled_from(SHAPES),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(HERE),
)
def test_broadcasting(name, shapes, reduction, backend):
    with use_backend(backend):
        x, t = (inputs(name, *shape)[1] for shape in shapes)
        agree(name, (x, t), {"reduction": reduction})


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_a_sum_beyond_the_dtype_is_infinite(name, backend):
    x = torch.full((2**10,), 3e37, device=DEVICE).requires_grad_()
    y = getattr(functional, name)(x, torch.zeros_like(x), reduction="sum")
    assert y == getattr(stock, name)(x, torch.zeros_like(x), reduction="sum") == float("inf")


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_device_does_not_matter(name):
    args = inputs(name, 2**16, dtype=torch.float32)
    expected = torch.autograd.grad(getattr(functional, name)(*args), args[0])
    with torch.device("meta"):
        found = torch.autograd.grad(getattr(functional, name)(*args), args[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_batchmean_beside_a_deprecated_argument(backend):
    agree("kl_div", inputs("kl_div", 4, 3), {"reduction": "batchmean", "size_average": True})


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (3,), (), (0, 3), (4, 0)])
@pytest.mark.parametrize("dy", [1.0, None])
def test_batchmean(shape, dy, backend):
    """The divisor is the length of the input, before it is broadcast."""
    x, _ = inputs("kl_div", *shape)
    _, t = inputs("kl_div", *((4, 3) if shape in ((1, 3), (3,)) else shape))
    agree("kl_div", [x, t], {"reduction": "batchmean"}, dy)


def test_derivatives_of_the_logits_loss_at_zero(backend):
    """softplus is smooth there, whatever it is computed from."""
    x, t = (
        torch.full((3,), v, dtype=torch.float64, device=DEVICE).requires_grad_() for v in (0.0, 0.3)
    )
    p = torch.full_like(x, 3.0).detach()
    found = []
    for module in (functional, stock):
        (dt,) = torch.autograd.grad(
            module.binary_cross_entropy_with_logits(x, t, pos_weight=p).sum(), t, create_graph=True
        )
        found += torch.autograd.grad(dt.sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("log_input", [True, False])
def test_stirling_begins_above_one(log_input, backend):
    """A count of one, where log t! is 0 and the approximation is not."""
    t = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 7.0], dtype=torch.float64, device=DEVICE)
    x = torch.rand(6, dtype=torch.float64, device=DEVICE).requires_grad_()
    options = {"log_input": log_input, "full": True, "reduction": "none"}
    agree("poisson_nll_loss", [x, t], options)
    if log_input:  # stock's slope is NaN where the approximation is not taken
        loss = functional.poisson_nll_loss(x, t.requires_grad_(), **options)
        (dt,) = torch.autograd.grad(loss.sum(), t, create_graph=True)
        expected = -x + torch.where(t > 1, t.log() + 0.5 / t, 0)
        torch.testing.assert_close(dt.detach(), expected.detach())
        (dtt,) = torch.autograd.grad(dt.sum(), t)
        torch.testing.assert_close(dtt, torch.where(t > 1, 1 / t - 0.5 / t**2, 0).detach())


def test_kl_div_of_an_impossible_event(backend):
    """t log t is 0 at t = 0, also beside a log-probability of minus infinity."""
    x = torch.tensor(
        [-1.0, -2.0, -float("inf")], dtype=torch.float64, device=DEVICE
    ).requires_grad_()
    t = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, device=DEVICE)
    agree("kl_div", [x, t], {"reduction": "none"})


@pytest.mark.skipif("triton" not in HERE, reason="kernels do not run here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "t"), [("binary_cross_entropy_with_logits", 0.3), ("poisson_nll_loss", 2.0)]
)
def test_every_input_of_16_bits(name, t, dtype):
    """Value and derivative are float64's, rounded once, but for what a difference loses."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)].to(DEVICE)
    found = []
    for module, of in ((functional, dtype), (stock, torch.float64)):
        given = x.to(of).requires_grad_()
        target = torch.full_like(x, t).to(of)  # what 16 bits make of it, in both
        with use_backend("triton"):
            loss = getattr(module, name)(given, target, reduction="none")
            (dx,) = torch.autograd.grad(loss, given, torch.ones_like(loss))
        found.append((loss.detach(), dx))
    for ours, truth in zip(*found, strict=True):
        limits = torch.finfo(dtype)
        held = torch.isfinite(truth) & (truth.abs() < limits.max)
        unit = truth.abs().clamp_min(limits.tiny).log2().floor().exp2() * limits.eps
        assert ((ours.double() - truth).abs() / unit)[held].max() < 0.6
