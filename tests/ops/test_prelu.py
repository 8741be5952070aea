"""The parametric ReLU beyond what the op database drives: sizes of several chunks and tiles,
layouts, frozen weights, bad calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional
from custom_backprop.backends import get_backend
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.checks.compare import sliced, transposed


def compare(x, weight, rtol=1e-9, atol=1e-9):
    """Value and both gradients, wanted together and one by one."""
    dy = transposed(torch.randn(x.shape, dtype=x.dtype, device=DEVICE))
    x, weight = x.detach().to(DEVICE), weight.detach().to(DEVICE)
    for wanted in ((True, True), (True, False), (False, True)):
        found = []
        for function in (functional.prelu, F.prelu):
            leaves = [
                t.detach().requires_grad_(want) for t, want in zip((x, weight), wanted, strict=True)
            ]
            y = function(*leaves)
            found.append(
                [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)]
            )
        assert found[0][0].stride() == found[1][0].stride()
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 1),
        (1, 2),
        (2, 5, 1023),
        (2, 3, 1025),
        (300, 5),
        (70, 200),
        (7, 3, 7, 7),
        (2, 33, 5),
        (1, 2, 4097),
        (5, 2, 3, 2, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("one", [True, False], ids=["one weight", "a weight a channel"])
def test_sizes(shape, one, backend):
    compare(
        torch.randn(shape, dtype=torch.float64),
        torch.randn(1 if one else shape[1], dtype=torch.float64),
    )


@pytest.mark.parametrize("shape", [(5, 3, 150, 150), (1, 2, 70000), (140000,)], ids=str)
def test_more_than_a_chunk_of_the_cpu(shape, backend):
    """Sizes that the CPU takes in parts, along whatever the first dimension is."""
    if get_backend() == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter meets several programs in test_sizes")
    compare(
        torch.randn(shape, dtype=torch.float64),
        torch.randn(1 if len(shape) == 1 else shape[1], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    "x",
    [
        transposed(torch.randn(4, 3, 5, dtype=torch.float64)),
        sliced(torch.randn(4, 3, 5, dtype=torch.float64)),
        torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 1, dtype=torch.float64).expand(2, 3, 7),
        torch.randn(3, 7, 2, dtype=torch.float64).permute(1, 0, 2),
    ],
    ids=["transposed", "sliced", "channels_last", "expanded", "permuted"],
)
def test_layouts(x, backend):
    compare(x, torch.randn(3, dtype=torch.float64))
    compare(x, torch.randn(6, dtype=torch.float64)[::2])


def test_extreme_values_and_the_kink(backend):
    x = torch.tensor([[-float("inf"), -1e4, -0.0, 0.0, 1e4, float("inf"), float("nan")]])
    compare(x, torch.tensor([0.25]), 1e-6, 0)
    compare(x, torch.linspace(-1, 1, 7), 1e-6, 0)


def test_the_weights_sum_is_held_in_float32(backend):
    """In bfloat16 a running sum of ones stops at 256."""
    x = -torch.ones(3000, 2, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.ones(2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    functional.prelu(x, weight).sum().backward()
    assert weight.grad.tolist() == [-3008.0, -3008.0]  # 3000 rounded to bfloat16


def test_nothing_is_computed_for_a_frozen_weight():
    from custom_backprop import use_backend

    launched = []
    launch = kernels("launch")
    with (
        use_backend("triton"),
        launch.observed(
            lambda kernel, programs, args, constexprs, options: launched.append(constexprs)
        ),
    ):
        for frozen in (0, 1):
            leaves = [
                t.requires_grad_(i != frozen)
                for i, t in enumerate(
                    (torch.randn(2, 3, device=DEVICE), torch.randn(3, device=DEVICE))
                )
            ]
            functional.prelu(*leaves).sum().backward()
            assert leaves[frozen].grad is None
    backwards = [c for c in launched if "NEED_W" in c]
    assert [(c["NEED_X"], c["NEED_W"]) for c in backwards] == [(False, True), (True, False)]


X, W = torch.ones(2, 3), torch.ones(3)


@pytest.mark.parametrize(
    "args",
    [
        (torch.tensor(1.0), torch.ones(2)),
        (torch.ones(3), torch.ones(3)),
        (X, torch.ones(2)),
        (X, torch.ones(1, 3)),
        (X, torch.ones(1, 1)),
        (X.double(), W),
        (X.long(), W.long()),
        (X.cfloat(), W.cfloat()),
        (X, torch.ones(3, device="meta")),
        (X, 0.25),
        (None, W),
        (X,),
    ],
    ids=lambda args: ", ".join(str(getattr(a, "shape", a)) for a in args).replace("torch.Size", ""),
)
def test_bad_calls_raise_what_stock_raises(args, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the type is what is compared
        F.prelu(*args)
    with pytest.raises(expected.type):
        functional.prelu(*args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_autocast_casts_input_and_weight(dtype, backend):
    """As stock's: after a layer under autocast the input is half precision, the weight float32."""
    x, w = torch.randn(3, 4, device=DEVICE, dtype=dtype), torch.randn(4, device=DEVICE)
    found = []
    for function in (functional.prelu, F.prelu):
        with torch.autocast(DEVICE, torch.bfloat16):
            if dtype == torch.float64:
                with pytest.raises(RuntimeError):
                    function(x, w)
            else:
                found.append(function(x, w))
    if found:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_sums_for_a_weight_that_cancel(dtype, backend):
    """Rows of opposite signs, several chunks of the CPU: no part of the sum is rounded."""
    x = -torch.rand(4, 40000, device=DEVICE).to(dtype) / 8
    weight = torch.full((1,), 0.25, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.ones_like(x)
    dy[::2] = -1
    (dw,) = torch.autograd.grad(functional.prelu(x, weight), weight, dy)
    expected = (x.double() * dy).sum().view(1).to(dtype)
    torch.testing.assert_close(dw, expected, rtol=2e-2, atol=0)
