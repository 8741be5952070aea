"""layer_norm and rms_norm beyond what the op database asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.backends import interpreting, why_not
from custom_backprop.backends.kernels import kernels

on_triton = pytest.mark.skipif(
    why_not("triton", DEVICE) is not None, reason=str(why_not("triton", DEVICE))
)
EPS = 1e-5


def gradients(function, x, *parameters):
    leaves = [x.detach().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(y)  # the same in every dtype
    return y, *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("shape", [(7, 1), (3, 129), (65, 33), (2, 5000), (1000, 150)])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_of_any_width_and_number(name, shape, backend):
    """Also such as end inside a chunk, a block or a program's share."""
    count = shape[0] if backend != "triton" else min(shape[0], 70)
    x = torch.randn(count, shape[1], dtype=torch.float64, device=DEVICE)
    parameters = torch.randn(2 if name == "layer_norm" else 1, shape[1]).to(x).unbind()
    found = [
        gradients(lambda x, *p, m=m: getattr(m, name)(x, x.shape[1:], *p), x, *parameters)
        for m in (functional, F)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@on_triton
@pytest.mark.parametrize("n", [8208, 2**14, 2**16 + 16, 2**17])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_that_blocks_share(name, n):
    if not kernels("launch").has_clusters(torch.device(DEVICE)):
        pytest.skip("there are no clusters of blocks here")
    x = torch.randn(300, n, device=DEVICE).bfloat16()
    parameters = torch.randn(2 if name == "layer_norm" else 1, n, device=DEVICE).bfloat16().unbind()
    wide = x.double(), *(p.double() for p in parameters)
    ours = gradients(lambda x, *p: getattr(functional, name)(x, (n,), *p, eps=EPS), x, *parameters)
    truth = gradients(lambda x, *p: getattr(F, name)(x, (n,), *p, eps=EPS), *wide)
    for our, true in zip(ours, truth, strict=True):
        error = (our.double() - true).abs().max() / true.abs().max()
        assert error < 2**-8


@on_triton
def test_which_rows_blocks_share(monkeypatch):
    """Those longer than 8192, in backward from 8192 on, of a multiple of 16, on a GPU that has
    clusters; in float32 forward alone, in float64 none. Each of the others is read in a loop, and
    backward needs its sums first."""
    launch, norm = kernels("launch"), kernels("norm")
    monkeypatch.setattr(launch, "_TRITON", (3, 9))
    monkeypatch.delenv("CUSTOM_BACKPROP_NO_CLUSTERS", raising=False)

    def launched(n, dtype):
        x, seen = torch.empty(4, n, dtype=dtype, device="meta"), []
        with launch.meta_capability(90), launch.observed(lambda *call: seen.append(call)):
            _, mean, rstd = norm.forward(x, x[0], x[0], EPS, "layer")
            norm.backward(x, x, x[0], mean, rstd, "layer", True, True, True)
        return [(kernel.__name__, options.get("num_ctas", 1)) for kernel, *_, options in seen]

    whole, sums = ("_row_sums", 1), ("_column_sum", 1)
    assert launched(4096, torch.bfloat16) == [("_forward", 1), ("_backward", 1), sums]
    assert launched(8192, torch.bfloat16) == [("_forward", 1), ("_backward", 2), sums]
    assert launched(8208, torch.bfloat16) == [("_forward", 2), ("_backward", 4), sums]
    assert launched(2**17, torch.bfloat16) == [("_forward", 16), ("_backward", 16), sums]
    assert launched(2**17 + 16, torch.bfloat16)[1:] == [whole, ("_backward", 1), sums]
    assert launched(8209, torch.bfloat16)[:2] == [("_forward", 1), whole]
    assert launched(8208, torch.float32)[1:] == [whole, ("_backward", 1), sums]
    assert launched(8208, torch.float64)[:2] == [("_forward", 1), whole]


@pytest.mark.parametrize("n", [100, 20000, 20001])
def test_the_mean_is_taken_out_before_squares_are_added(n, backend):
    """One pass over x and x² would leave nothing of this variance. In a block; in a loop, several
    numbers at once and one by one, after a first number that is far from all others."""
    x = torch.randn(4, n, device=DEVICE) + 4096
    x[0, 0] = -4096
    ours = functional.layer_norm(x, (n,))
    torch.testing.assert_close(ours, F.layer_norm(x.double(), (n,)).float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("casting", ["torch", "llama", "gemma"])
def test_where_half_precision_is_rounded(casting, dtype, weight_dtype, backend):
    """As the models' own code, in the dtype that it gives."""
    x = torch.randn(8, 96, device=DEVICE).to(dtype)
    w = torch.randn(96, device=DEVICE).to(weight_dtype or dtype)
    unit = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = {
        "torch": lambda: (unit * w.float()).to(dtype),
        "llama": lambda: w * unit.to(dtype),
        "gemma": lambda: (unit * (1 + w.float())).to(dtype),
    }[casting]()
    y = functional.rms_norm(x, (96,), w, 1e-6, casting=casting)
    assert y.dtype == expected.dtype
    if backend == "triton" and interpreting() and dtype == torch.bfloat16:
        # the interpreter computes bfloat16 tensors in float32, and rounds at the end
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
    else:
        different = (y != expected).float().mean()
        assert different < 0.02, "but for the last bit of a float32 statistic"
    y, dx, dw = gradients(lambda x, w: functional.rms_norm(x, (96,), w, 1e-6, casting), x, w)
    assert (dx.dtype, dw.dtype) == (dtype, w.dtype)
    exact = gradients(
        lambda x, w: functional.rms_norm(x, (96,), w, 1e-6, casting), x.double(), w.double()
    )
    for ours, truth in zip((dx, dw), exact[1:], strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), truth, rtol=eps, atol=eps * truth.abs().max())


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.ones(2, 8), (4,)), RuntimeError),
        ((torch.ones(2, 8), ()), RuntimeError),
        ((torch.ones(2, 8), (8,), torch.ones(7)), RuntimeError),
        ((torch.ones(2, 8), (8,), torch.ones(9)), RuntimeError),
        ((torch.ones(2, 8), 8), TypeError),
        ((torch.arange(8), (8,)), NotImplementedError),
    ],
)
def test_bad_calls_raise_what_stock_raises(name, arguments, error):
    for module in (functional, F):
        with pytest.raises(error):
            getattr(module, name)(*arguments)


def test_only_rms_norm_has_a_default_epsilon_by_none():
    x = torch.randn(2, 8)
    assert functional.rms_norm(x, (8,), None, None).equal(functional.rms_norm(x, (8,)))
    with pytest.raises(TypeError):
        functional.layer_norm(x, (8,), None, None, None)


def test_bad_castings():
    with pytest.raises(ValueError, match="casting must be one of torch, llama, gemma"):
        functional.rms_norm(torch.ones(2, 8), (8,), casting="mistral")


def test_modules_are_converted_and_reverted():
    model = torch.nn.Sequential(torch.nn.LayerNorm((2, 4)), torch.nn.RMSNorm(4, eps=1e-3))
    x = torch.randn(3, 2, 4)
    expected = model(x)
    custom_backprop.convert(model)
    assert [type(m) for m in model] == [nn.LayerNorm, nn.RMSNorm]
    torch.testing.assert_close(model(x), expected)
    assert "casting" not in repr(model)
    custom_backprop.revert(model)
    assert [type(m) for m in model] == [torch.nn.LayerNorm, torch.nn.RMSNorm]
    assert "casting='gemma'" in repr(nn.RMSNorm(4, casting="gemma"))


def test_frozen_weights_get_no_gradient(backend):
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    w, b = torch.randn(2, 4, device=DEVICE).unbind()
    functional.layer_norm(x, (4,), w, b).square().sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_stocks_second_derivative_under_torch_func_is_wrong():
    """torch 2.13: the block of the Hessian of layer_norm for weight, then input. Its nested forward
    mode is wrong too: pytorch issue 196700. When this fails, the spec's reference can be stock's
    everywhere."""
    x, w, b, v = torch.randn(4, 5, dtype=torch.float64).unbind()

    def hessian(module):
        return torch.func.hessian(
            lambda x, w: (module.layer_norm(x, (5,), w, b) * v).sum(), argnums=(0, 1)
        )(x, w)

    ours, stock = hessian(functional), hessian(F)
    torch.testing.assert_close(ours[1][0], ours[0][1].t())
    torch.testing.assert_close(ours[0], stock[0])
    assert not torch.allclose(stock[1][0], stock[0][1].t()), "stock is right now"


def test_stock_has_no_second_derivative_of_a_bias_alone(backend):
    """torch 2.13: it takes the weight that is not there. When this fails, the spec's reference can
    be stock's there too."""
    x, b = (
        torch.randn(s, dtype=torch.float64, device=DEVICE).requires_grad_() for s in ((2, 5), 5)
    )
    v = torch.randn(2, 5, dtype=torch.float64, device=DEVICE)

    def second(module):
        y = module.layer_norm(x, (5,), None, b)
        dx, db = torch.autograd.grad((y * v).sum(), (x, b), create_graph=True)
        return torch.autograd.grad((dx * v).sum() + (db * v).sum(), x)[0]

    assert second(functional).isfinite().all()
    with pytest.raises(RuntimeError, match="undefined Tensor"):
        second(F)


@pytest.mark.parametrize("shape", [(7, 1), (3, 129), (2, 5000)])
@pytest.mark.parametrize("used", ["both", "y", "h"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_sum_and_its_norm(name, used, shape, backend):
    """Rows in a loop too, and where one output alone is used."""
    x, a = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE).unbind()
    w = torch.randn(shape[1]).to(x)
    found = []
    for ours in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, w)]
        if ours:
            y, h = getattr(functional, f"add_{name}")(*leaves[:2], (shape[1],), leaves[2])
        else:
            h = leaves[0] + leaves[1]
            y = getattr(F, name)(h, (shape[1],), leaves[2])
        loss = {"both": y.sin() + h.cos(), "y": y.sin(), "h": h.cos()}[used].sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append((y, h, *[g for g in grads if g is not None]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(backend):
    """What comes out as h is what was normalised."""
    x, a = torch.randn(2, 4, 96, device=DEVICE).bfloat16().unbind()
    y, h = functional.add_layer_norm(x, a, (96,))
    assert torch.equal(h, x + a)
    expected = F.layer_norm((x + a).double(), (96,))
    if backend != "triton" or not interpreting():  # which does not round h
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_bad_residuals(name):
    call, x = getattr(functional, name), torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="residual of shape"):
        call(x, torch.ones(8), (8,))
    with pytest.raises(RuntimeError, match="residual of shape"):
        call(x, x.double(), (8,))
    with pytest.raises(TypeError, match="residual must be a Tensor"):
        call(x, None, (8,))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        call(x, x, (4,))


@on_triton
@pytest.mark.parametrize("n", [12345, 20001])
def test_a_far_mean_is_rounded_once(n):
    """In a loop over the row. Numbers from 4096 on are multiples of 2^-11: their mean is off by
    half of one."""
    x = 4096 + 0.25 * torch.randn(6, n, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    with custom_backprop.use_backend("triton"):
        y = functional.layer_norm(x, (n,), eps=0.0)
    off = (y - F.layer_norm(x.double(), (n,), eps=0.0)).mean(1)
    assert off.abs().max() <= 1.1 * 2**-12 / 0.25
