"""Softmaxes beyond what the op database drives: every regime of the kernels, masks, extreme values,
dims, dtypes, warnings, bad calls."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_backprop import functional, nn, use_backend
from custom_backprop.backends import BACKENDS, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing import database
from custom_backprop.testing.strategies import tensors, views

INF, NAN = float("inf"), float("nan")
HERE = [b for b in BACKENDS if why_not(b, DEVICE) is None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPECS = {s.name: s for s in database().values() if s.family == "softmax"}
each = pytest.mark.parametrize("name", SPECS)
#: the widest row in one pass and the first in a loop, backward's and forward's
WIDTHS = {torch.float64: (4096, 4097, 8192, 8193), torch.float32: (16384, 16385, 32768, 32769)}
#: too long for one block of threads; the interpreter takes its time
LONG = (65537, 131071, 262144)
if torch.cuda.is_available():
    LONG = tuple(2**k + more for k in (15, 16, 17, 18) for more in (-1, 0, 1))
on_triton = pytest.mark.skipif("triton" not in HERE, reason=str(why_not("triton", DEVICE)))


def results(function, x, dim=-1, dy=None, **kwargs):
    """y, and dx for dy or weights that depend on the shape alone."""
    x = x.detach().requires_grad_()  # keeps its strides
    y = function(x, dim, **kwargs)
    if dy is None:
        dy = torch.randn(
            y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        ).to(y.device, y.dtype)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def same(ours, theirs, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def as_near_as_stock(name, x, **kwargs):
    """NaN and infinite where stock is; elsewhere no further from the float64 truth than stock, but
    for a few units of rounding."""
    ours, theirs = (results(getattr(of, name), x, **kwargs) for of in (functional, F))
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(
        x.device, ours[0].dtype
    )
    truths = results(getattr(F, name), x.double(), dy=dy.double())
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert (our.dtype, our.shape, our.stride()) == (their.dtype, their.shape, their.stride())
        assert torch.equal(our.isnan(), their.isnan())
        assert torch.equal(our.isinf(), their.isinf())
        finite = their.isfinite()
        our, their, truth = (t[finite].double() for t in (our, their, truth))
        if truth.numel():
            bound = (their - truth).abs().max() + 4 * torch.finfo(
                ours[0].dtype
            ).eps * truth.abs().max()
            assert (our - truth).abs().max() <= bound


@on_triton
@each
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 2047, 2048, 2049])
def test_widths_of_several_rows_a_program(name, n):
    x = torch.randn(2048 // n + 3 if n < 1000 else 2, n, dtype=torch.float64, device=DEVICE)
    expected = results(getattr(F, name), x)
    with use_backend("triton"):
        same(results(getattr(functional, name), x), expected)


@on_triton
@pytest.mark.parametrize("n", [*WIDTHS[torch.float64], *WIDTHS[torch.float32], *LONG])
@pytest.mark.parametrize("switch", ["", "1"])
def test_widths_of_one_row_a_program_and_of_a_loop(n, switch, switched):
    """In the loop the maximum comes first, and last, and no block's share of a sum may be lost. On
    a GPU that has clusters, these rows are shared among blocks, and then, without, in a loop."""
    if switch and not kernels("launch").has_clusters(torch.device(DEVICE)):
        pytest.skip("the same again: there are no clusters of blocks here to switch off")
    switched(switch)
    dtype = torch.float64 if n in WIDTHS[torch.float64] else torch.float32
    x = torch.randn(2, n, dtype=dtype, device=DEVICE)
    x[0, 0], x[1, -1] = 11, 11
    x = x[:1] if n > 100000 else x
    for name in SPECS:
        with use_backend("triton"):
            ours = results(getattr(functional, name), x)
        truth = results(getattr(F, name), x.double())
        rtol = 1e-10 if dtype == torch.float64 else 2e-5
        for our, true in zip(ours, truth, strict=True):
            same(our.double(), true, rtol, rtol * true.abs().max().item() / 10)


@on_triton
def test_every_regime_is_met():
    config = kernels("rows").row_config
    for dtype, (backward, past_backward, forward, past_forward) in WIDTHS.items():
        assert (config(forward, 1, dtype, 1).block, config(backward, 1, dtype, 2).block) == (
            forward,
            backward,
        )
        assert config(past_forward, 1, dtype, 1).block < forward
        assert config(past_backward, 1, dtype, 2).block < backward
    for n in (1, 7, 128, 1000, 50257, 262144):
        for inner in (1, 2, 3, 49, 64, 10000):
            for dtype in DTYPES:
                c = config(n, inner, dtype, 2)
                assert all(v.bit_count() == 1 for v in (c.rows, c.block, c.num_warps)), (
                    "powers of two"
                )
                assert c.rows * c.block <= 64 * 32 * c.num_warps <= 64 * 32 * 16
                assert inner == 1 or c.rows * dtype.itemsize >= min(128, inner * dtype.itemsize), (
                    "whole cache lines"
                )


@on_triton
def test_which_rows_blocks_share(switched, monkeypatch):
    """Those longer than 8192 of a GPU that has clusters, up to 2^18. Never in float64, nor side by
    side."""
    seen = []

    def blocks(capability, *shape, dim=-1, dtype=torch.bfloat16):
        x = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        observer = launch.observed(lambda *call: seen.append(call[-1].get("num_ctas", 1)))
        with launch.meta_capability(capability), observer:
            module = kernels("softmax")
            y = module.forward("softmax", x, x.dim() + dim, None)
            module.backward("softmax", y, y, x.dim() + dim, dtype)
        forward, backward = seen[-2:]
        assert forward == backward
        return forward

    launch = kernels("launch")
    monkeypatch.setattr(launch, "_TRITON", (3, 9))
    switched("")
    sizes = (8192, 8193, 2**15, 2**15 + 1, 2**16, 2**17, 2**18, 2**18 + 1)
    assert [blocks(90, 4, n) for n in sizes] == [1, 2, 4, 8, 8, 16, 16, 1]
    assert blocks(100, 4, 2**15, dtype=torch.float32) == 4
    assert blocks(90, 4, 2**15, dtype=torch.float64) == 1
    assert blocks(90, 4, 2**15, 2, dim=-2) == 1
    assert blocks(80, 4, 2**15) == blocks(0, 4, 2**15) == 1
    switched("1")
    assert blocks(90, 4, 2**15) == 1
    switched("")
    monkeypatch.setattr(launch, "_TRITON", (3, 8))
    assert blocks(90, 4, 2**15) == 1


@on_triton
@each
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 300, 2), (1, 700, 70), (3, 2, 33)])
def test_rows_side_by_side(name, shape, monkeypatch):
    """A dimension with another after it, in one pass and in a loop, sizes that the tile does not
    divide, in offsets of both widths."""
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    expected = results(getattr(F, name), x, 1)
    rows, plan = kernels("rows"), kernels("softmax").plan
    for far in (rows.far, lambda extent: True):
        plan.cache_clear()
        monkeypatch.setattr(rows, "far", far)
        with use_backend("triton"):
            same(results(getattr(functional, name), x, 1), expected)
    plan.cache_clear()


@on_triton
def test_offsets_grow_with_the_tensor():
    launch, module, seen = kernels("launch"), kernels("softmax"), []
    with launch.observed(
        lambda kernel, programs, args, constexprs, options: seen.append(
            (constexprs["WIDE"], constexprs["WIDE_COLUMNS"])
        )
    ):
        for shape, dim in (((2**15, 2**14), 1), ((2**16, 2**15), 1), ((2**15, 2**16), 0)):
            x = torch.empty(shape, device="meta")
            module.backward("softmax", x, module.forward("softmax", x, dim, None), dim, x.dtype)
        module.forward(
            "softmax", torch.empty(2**16, 2**15, device="meta")[:, :3], 1, None
        )  # few elements, far apart
        y = torch.empty(2**15, 2**16, device="meta")
        for dim in range(2):
            module.backward("softmax", y.new_empty(()).expand(y.shape), y, dim, y.dtype)  # of a sum
    assert seen[:4] == [(False, False)] * 2 + [(True, False)] * 2
    assert seen[4:] == [(True, True)] * 2 + [(True, False), (True, True), (True, False)]


@each
def test_a_narrower_dtype_rounds_the_input_first(name, backend):
    """As stock does. (In bfloat16 the interpreter does not.)"""
    x = torch.tensor([[100.3, 100.0, 99.9]], dtype=torch.float64, device=DEVICE)
    for dtype in (torch.float32, torch.float16):
        ours, stock = (getattr(m, name)(x, 1, dtype=dtype) for m in (functional, F))
        torch.testing.assert_close(ours, stock, rtol=2 * torch.finfo(dtype).eps, atol=0)


@each
@pytest.mark.parametrize("dim", range(-4, 4))
def test_every_dim(name, dim, backend):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    for layout in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        x[:, :, ::2, 1:],
    ):
        ours, theirs = (results(getattr(of, name), layout, dim) for of in (functional, F))
        same(ours, theirs)
        assert ours[0].stride() == theirs[0].stride()


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_inputs(name, dtype, scale, backend):
    x = (
        torch.tensor(
            [[-1.0, 1.0, 0.5], [1.0, 1.0, 1.0], [-1.0, -1.0, -0.999], [0.0, 0.0, 1.0]],
            dtype=torch.float64,
            device=DEVICE,
        )
        * scale
    )
    as_near_as_stock(name, x.to(dtype))


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_special_values(name, dtype, backend):
    """Attention masks: a row with some -inf, with all but one, with nothing else (NaN, as stock);
    and +inf and NaN."""
    lowest = torch.finfo(dtype).min
    masked = [[1, -INF, 2, -INF], [-INF, -INF, -INF, 3], [-INF] * 4]
    rows = [
        *masked,
        [1, INF, 2, 0],
        [INF, INF, -INF, 0],
        [NAN, 1, 2, 3],
        [lowest] * 4,
        [-lowest] * 4,
    ]
    as_near_as_stock(name, torch.tensor(rows, dtype=dtype, device=DEVICE))


@on_triton
@each
def test_masks_and_special_values_in_a_loop(name):
    n = 33000
    x = torch.randn(6, n, device=DEVICE)
    x[0, : n // 2], x[1, 1:], x[2, :] = -INF, -INF, -INF
    x[3, 17], x[4, -1], x[5, n // 2] = INF, NAN, torch.finfo(torch.float32).min
    with use_backend("triton"):
        as_near_as_stock(name, x)
        as_near_as_stock(name, -x)


@each
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_dtype(name, given, wanted, backend):
    """Computed in ``dtype``, the gradient back in the input's own."""
    x = torch.randn(3, 7, dtype=torch.float64, device=DEVICE).to(given)
    ours, theirs = (results(getattr(of, name), x, dtype=wanted) for of in (functional, F))
    eps = max(torch.finfo(given).eps, torch.finfo(wanted).eps)
    same(ours, theirs, 4 * eps, 4 * eps)
    assert [t.dtype for t in ours] == [wanted, given]


@each
def test_integers(name, backend):
    x = torch.randint(0, 5, (3, 4), device=DEVICE)
    same(
        getattr(functional, name)(x, 1, dtype=torch.float64),
        getattr(F, name)(x, 1, dtype=torch.float64),
    )


@each
def test_a_softmax_does_not_see_a_shift(name, backend):
    """So the gradient of Σ y, all ones, is zero for the two that sum to one, and the gradients of
    every row sum to zero."""
    x = torch.randn(5, 9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(getattr(functional, name)(x, 1).sum(), x)
    same(dx.sum(1), torch.zeros(5, dtype=torch.float64, device=DEVICE))
    assert (dx.abs().max() < 1e-15) == (name != "log_softmax")


@each
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2), (2, 2, 2, 2)])
@pytest.mark.parametrize("module", [False, True])
def test_implicit_dim(name, shape, module, backend):
    """The dimension that stock takes, with stock's warning, which points at the caller's line."""
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    found = []
    for functions, of_module in zip((functional, F), SPECS[name].module[:2], strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = of_module()(x) if module else getattr(functions, name)(x)
        found.append((y, [(w.category, str(w.message), w.filename, w.lineno) for w in caught]))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 1
    assert "Implicit dimension" in found[0][1][0][1]


@each
@pytest.mark.parametrize(
    ("make", "dim", "kwargs"),
    [
        (lambda: torch.randn(2, 3), 2, {}),
        (lambda: torch.randn(2, 3), -3, {}),
        (lambda: torch.tensor(1.0), 1, {}),
        (lambda: torch.randn(2, 3), 1.5, {}),
        (lambda: torch.randn(2, 3), [1], {}),
        (lambda: torch.ones(2, 3, dtype=torch.int64), 1, {}),
        (lambda: torch.ones(2, 3, dtype=torch.bool), 1, {}),
        (lambda: torch.ones(2, 3, dtype=torch.complex64), 1, {}),
        (lambda: torch.randn(2, 3), 1, {"dtype": torch.int64}),
    ],
)
def test_bad_calls_raise_what_stock_raises(name, make, dim, kwargs, backend):
    x = make().to(DEVICE)
    with pytest.raises(Exception) as stock:  # noqa: PT011
        getattr(F, name)(x, dim, **kwargs)
    with pytest.raises(stock.type):
        getattr(functional, name)(x, dim, **kwargs)


def test_a_dim_out_of_range_is_named_with_the_shape():
    with pytest.raises(IndexError, match=r"range of \[-2, 1\], but got 5.*\(2, 3\)"):
        functional.softmax(torch.randn(2, 3), 5)


@each
def test_a_dim_is_no_name(name):
    """torch 2.11 looks for a dimension of that name, and raises RuntimeError; later ones raise
    TypeError."""
    with pytest.raises(TypeError):
        getattr(functional, name)(torch.randn(2, 3), "last")


def test_softmax_2d(backend):
    for shape in ((2, 3, 4, 5), (3, 4, 5)):
        x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
        same(nn.Softmax2d()(x), torch.nn.Softmax2d()(x))
    assert repr(nn.Softmax2d()) == repr(torch.nn.Softmax2d())
    assert isinstance(nn.Softmax2d(), torch.nn.Softmax2d)
    with pytest.raises(ValueError, match="got 2D"):
        nn.Softmax2d()(torch.randn(2, 3))


@each
def test_only_the_output_is_kept(name):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = getattr(functional, name)(torch.randn(3, 4, requires_grad=True), 1)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.skipif(DEVICE != "cuda", reason="autocast of a GPU")
@each
def test_autocast_computes_in_float32(name):
    x = torch.randn(3, 5, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = (results(getattr(of, name), x) for of in (functional, F))
        assert (
            [t.dtype for t in ours] == [t.dtype for t in theirs] == [torch.float32, torch.float16]
        )
        assert getattr(functional, name)(x.double(), 1).dtype == torch.float64


@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(data=st.data())
@each
def test_any_shape_dim_and_strides(name, data):
    x = data.draw(tensors(special=(-INF, 1e3)))
    dim = data.draw(st.integers(-max(x.dim(), 1), max(x.dim(), 1) - 1))
    x = x.to(DEVICE)
    dy = data.draw(views(x.shape)).holding(torch.randn(x.shape, dtype=x.dtype, device=DEVICE))
    expected = results(getattr(F, name), x, dim, dy)
    for b in HERE:
        with use_backend(b):
            same(results(getattr(functional, name), x, dim, dy), expected)
