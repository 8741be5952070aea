"""linear_cross_entropy beyond what the op database drives: chunks, what is made and what is not,
the failures of others, exact tails, bad calls."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch.profiler import ProfilerActivity, profile

from custom_backprop import functional, nn
from custom_backprop.backends import why_not
from custom_backprop.backends.linear_cross_entropy import rows_of_chunk
from custom_backprop.testing import validate
from custom_backprop.testing.regimes import launches
from custom_backprop.testing.specs.linear_cross_entropy import (
    linear_cross_entropy as by_stock,
)

ours = functional.linear_cross_entropy
IGNORED = -100


def layer(rows, classes, features=5, dtype=torch.float64):
    """x, W, b and classes, of which the second row's is ignored."""
    shapes = ((rows, features), (classes, features), (classes,))
    x, w, b = (torch.randn(s, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)
    t = torch.randint(classes, (rows,), device=DEVICE)
    t[1:2] = IGNORED
    return [t.requires_grad_() for t in (x, w, b)], t


def gradients(function, leaves, t, dy=None, **options):
    """The loss, and the gradients of x, W and b for a random dy."""
    x, w, b = leaves
    loss = function(x, w, t, b, **options)
    if dy is None:
        torch.manual_seed(3)
        dy = torch.randn(loss.shape, dtype=torch.float64)
    return loss, *torch.autograd.grad(loss, leaves, dy.to(loss))


def agree(leaves, t, rtol=1e-9, **options):
    torch.testing.assert_close(
        gradients(ours, leaves, t, **options),
        gradients(by_stock, leaves, t, **options),
        rtol=rtol,
        atol=1e-11,
    )


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def seen(call):
    """The result, the matrix products, and the elements of the largest operand of any operator."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        result = call()
    events = watched.events()
    operands = [shape for e in events for shape in e.input_shapes if shape]
    return (
        result,
        [e.name for e in events if e.name in PRODUCTS],
        max(math.prod(shape) for shape in operands if isinstance(shape[0], int)),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks(chunk, reduction, backend):
    """Whose number divides the rows or not: the same result, with every option."""
    leaves, t = layer(7, 11)
    agree(leaves, t, reduction=reduction, chunk_size=chunk)
    options = {
        "weight": torch.rand(11, dtype=torch.float64, device=DEVICE) + 0.1,
        "token_weight": torch.rand(7, dtype=torch.float64, device=DEVICE),
        "label_smoothing": 0.1,
        "softcap": 2.0,
        "z_loss": 0.1,
    }
    agree(leaves, t, reduction=reduction, chunk_size=chunk, **options)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 2.0}, {"z_loss": 0.1}], ids=str
)
def test_a_chunk_that_is_no_small_one(options):
    """There the gradient is written over the logits, unless they are read again."""
    leaves, t = layer(300, 300)
    agree(leaves, t, reduction="none", **options)
    agree(leaves, t, **options)


def test_the_number_of_rows_of_a_chunk():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_of_chunk(1024, 32000, 4, cpu, True) == 256
    assert rows_of_chunk(2048, 65, 4, cpu, True) == 2048
    assert rows_of_chunk(16384, 128256, 2, gpu, True) == 4096
    assert rows_of_chunk(16384, 128256, 4, gpu, True) == 2048
    assert rows_of_chunk(16384, 128256, 2, gpu, False) == 2048
    assert rows_of_chunk(4097, 128256, 2, gpu, True) == 2049, "chunks of one size"
    assert rows_of_chunk(0, 10, 4, cpu, True) == 1


@pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason="it is the kernels' chunk")
@pytest.mark.parametrize(("frozen", "chunks"), [(False, 2), (True, 4)])
def test_chunks_are_half_as_long_where_no_dw_is_wanted(frozen, chunks):
    x, w = (torch.empty(n, 16, device="meta", dtype=torch.bfloat16) for n in (8192, 128256))
    t = torch.empty(8192, device="meta", dtype=torch.int64)
    leaves = x.requires_grad_(), w.requires_grad_(not frozen)
    assert [one.kernel.__name__ for one in launches(lambda: ours(*leaves, t))] == chunks * [
        "_forward"
    ]


def test_torchs_options_set_the_chunk():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("torch has them since 2.13")
    leaves, t = layer(6, 50)
    _, _, largest = seen(lambda: ours(*leaves[:2], t, options=options(batch_chunk_size=2)))
    assert largest < 6 * 50


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_are_never_whole(reduction):
    leaves, t = layer(32, 64, 3)
    call = functools.partial(gradients, ours, leaves, t, reduction=reduction, chunk_size=4)
    assert seen(call)[2] < 32 * 64


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_tensor_costs_nothing(frozen):
    """No product, no memory for its gradient (Liger-Kernel #1067, #1440: gradients of a frozen
    weight made for nobody)."""
    leaves, t = layer(6, 50, 4)
    every = [True, True, True]
    products = []
    for wanted in (every, [i != frozen for i in range(3)]):
        given = [a.detach().requires_grad_(need) for a, need in zip(leaves, wanted, strict=True)]
        call = functools.partial(ours, *given[:2], t, given[2])
        loss, made, _ = seen(call)
        loss.backward()
        products.append(len(made))
        assert [a.grad is not None for a in given] == wanted
    assert products == [4, 3]


def test_nothing_is_made_without_a_gradient():
    """Liger-Kernel #930: under no_grad its forward raised, as the gradient of the weight had no
    value."""
    leaves, t = layer(6, 50, 4)
    for given in (leaves, [a.detach() for a in leaves]):
        with torch.set_grad_enabled(given is not leaves):
            loss, products, _ = seen(functools.partial(ours, *given[:2], t, given[2]))
        assert products == ["aten::addmm"]
        assert not loss.requires_grad
        torch.testing.assert_close(loss, by_stock(*given[:2], t, given[2]))


def test_a_loss_of_rows_has_a_gradient_of_each_row(backend):
    """Liger-Kernel #968, #1298: each row's gradient was multiplied by the first row's dy, or by 0
    where that row was ignored. The sum over rows that forward has made cannot be taken apart."""
    leaves, t = layer(6, 9)
    t[0] = IGNORED
    dy = torch.tensor([0.0, 2.0, 0.0, -3.0, 0.5, 7.0], dtype=torch.float64, device=DEVICE)
    found = gradients(ours, leaves, t, dy, reduction="none", chunk_size=4)
    torch.testing.assert_close(found, gradients(by_stock, leaves, t, dy, reduction="none"))
    masked = (found[0].detach() * dy).sum()
    assert masked != 0


def test_an_input_without_a_gradient_has_a_loss(backend):
    """Liger-Kernel #507: the loss was 0 where the input needed no gradient."""
    leaves, t = layer(4, 3)
    x, w, b = (a.detach() for a in leaves)
    assert ours(x, w, t, b) > 0
    w.requires_grad_()
    loss = ours(x, w, t, b)
    torch.testing.assert_close(loss, by_stock(x, w, t, b))
    torch.testing.assert_close(*(torch.autograd.grad(f(x, w, t, b), w) for f in (ours, by_stock)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_tokens(reduction, backend):
    """Liger-Kernel #338 has none. A mean divides by their sum, so that 0 and 1 make a mask; what
    they mask may be infinite."""
    leaves, t = layer(6, 9)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.float64, device=DEVICE)
    options = {"reduction": reduction, "chunk_size": 4}
    found = gradients(ours, leaves, t, token_weight=mask, **options)
    expected = gradients(by_stock, leaves, torch.where(mask == 0, IGNORED, t), **options)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        leaves[0][2] = math.inf
    assert ours(*leaves[:2], t, leaves[2], token_weight=mask, reduction="sum").isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_is_summed_in_float32(dtype, backend):
    """Liger-Kernel #512: a sum over chunks in half precision loses the shares of later chunks, and
    training diverges. Here many chunks are as exact as one."""
    x = torch.full((40, 1), 1024, dtype=dtype, device=DEVICE)
    x[1:] = 0.5
    w = torch.zeros(2, 1, dtype=dtype, device=DEVICE).requires_grad_()
    t = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    found = []
    for chunk in (1, 40):
        loss = ours(x, w, t, reduction="sum", chunk_size=chunk)
        found += torch.autograd.grad(loss, w)
    for dw in found:  # half of 1024 + 39 / 2, of which half precision loses every summand
        torch.testing.assert_close(dw.flatten().tolist(), [-521.75, 521.75], rtol=4e-3, atol=0)


def test_autocast_has_the_gradient_of_a_float32_weight_in_float32():
    """Not by way of the lower precision of its product."""
    x, w = torch.ones(301, 1), torch.zeros(2, 1, requires_grad=True)
    t = torch.zeros(301, dtype=torch.int64)
    t[:7] = 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, w, t, reduction="sum")
    assert loss.dtype == torch.float32
    (dw,) = torch.autograd.grad(loss, w)
    assert dw.flatten().tolist() == [-143.5, 143.5]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, backend):
    leaves, t = layer(4, 3)
    t.fill_(IGNORED)
    found = gradients(ours, leaves, t, reduction=reduction, z_loss=0.1)
    expected = gradients(by_stock, leaves, t, reduction=reduction)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not any(g.count_nonzero() for g in found[1:])


@pytest.mark.parametrize("lead", [20.0, 40.0])
def test_a_certain_row_has_a_gradient(lead, backend):
    """Where the target leads by so much, stock's float32 has none: 1 - p is 0."""
    w = (torch.randn(5, 3, dtype=torch.float64) * 0.1).to(DEVICE, torch.float32)
    w[2] += lead
    leaves = [torch.eye(3, device=DEVICE).requires_grad_(), w.requires_grad_()]
    t = torch.full((3,), 2, device=DEVICE)
    loss = ours(*leaves, t, reduction="sum")
    dx, dw = torch.autograd.grad(loss, leaves)
    e = torch.exp(w.detach().double().t() - w.detach().double()[2].unsqueeze(1))  # x is 1
    e[:, 2] = 0
    others = e.sum(1, keepdim=True)
    p = e / (1 + others)
    p[:, 2:3] = -others / (1 + others)  # p_t - 1
    close = {"rtol": 2e-5, "atol": 0, "check_dtype": False}
    torch.testing.assert_close(loss, torch.log1p(others).sum(), **close)
    torch.testing.assert_close(dw, p.t(), **close)
    torch.testing.assert_close(dx, p @ w.detach().double(), **close)
    (of_stock,) = torch.autograd.grad(by_stock(*leaves, t, reduction="sum"), leaves[1])
    assert not of_stock[2].count_nonzero()


def test_retained_graphs_give_the_same_again(backend):
    """And twice the gradient of dL = 2, which is not that of dL = 1 handed out."""
    leaves, t = layer(5, 4)
    loss = ours(*leaves[:2], t, leaves[2])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(once, twice, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(2 * a, b)


def test_log_probabilities_of_tokens(backend):
    """Liger-Kernel #873 asks for them: of each token, beside a loss in any reduction, and with a
    gradient of their own."""
    leaves, t = layer(4, 5, 1)
    options = {"return_log_probs": True, "chunk_size": 3}
    given = *leaves[:2], t, leaves[2]
    loss, log_p = ours(*given, **options)
    rows = by_stock(*given, reduction="none")
    torch.testing.assert_close((loss, log_p), (by_stock(*given), -rows))
    ratio = torch.tensor([0.5, 7.0, -2.0, 3.0], dtype=log_p.dtype, device=DEVICE)
    found = torch.autograd.grad((log_p.exp() * ratio).sum(), leaves)
    expected = torch.autograd.grad(((-rows).exp() * ratio).sum(), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_outputs(reduction, backend):
    """Each is differentiable, alone and with the others."""
    leaves, t = layer(3, 4, 2)
    options = {"reduction": reduction, "z_loss": 0.2, "softcap": 3.0, "chunk_size": 2}
    options |= {"return_z_loss": True, "return_log_probs": True}
    loss, z, log_p = ours(*leaves[:2], t, **options)
    plain = {"reduction": "none", "softcap": 3.0}
    torch.testing.assert_close(log_p, -ours(*leaves[:2], t, **plain))
    assert log_p[1] == 0
    without = ours(*leaves[:2], t, reduction=reduction, softcap=3.0)
    torch.testing.assert_close(loss - z, without)
    for i, y in enumerate((loss, z, log_p)):
        alone = torch.autograd.grad(y.sum(), leaves[:2], retain_graph=True)
        stock = by_stock(*leaves[:2], t, **options)[i].sum()
        torch.testing.assert_close(alone, torch.autograd.grad(stock, leaves[:2]))


def test_every_derivative_of_more_outputs():
    leaves, t = layer(2, 3, 1)
    options = {"z_loss": 0.2, "softcap": 3.0, "chunk_size": 1}
    options |= {"return_z_loss": True, "return_log_probs": True}
    given = leaves[0], leaves[1], t
    validate(ours, given, by_stock, kwargs=options).raise_if_failed()


def test_a_module_takes_weights_of_tokens():
    module = nn.LinearCrossEntropyLoss(5, 9, bias=True, dtype=torch.float64, softcap=2.0)
    leaves, t = layer(6, 9)
    w = torch.rand(6, dtype=torch.float64)
    linear = module.linear
    found = module(leaves[0].cpu(), t.cpu(), w)
    expected = by_stock(
        leaves[0].cpu(), linear.weight, t.cpu(), linear.bias, token_weight=w, softcap=2.0
    )
    torch.testing.assert_close(found, expected)
    assert "softcap=2.0" in repr(module)


X, W, T = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0])
BAD = [
    (RuntimeError, "(2, 2, 3)", lambda f: f(torch.randn(2, 2, 3), W, T)),
    (RuntimeError, "(3,)", lambda f: f(X, torch.randn(3), T)),
    (RuntimeError, "(5, 4)", lambda f: f(X, torch.randn(5, 4), T)),
    (RuntimeError, "(5, 2, 3)", lambda f: f(X[0], torch.randn(5, 2, 3), T[0])),
    (RuntimeError, "(4,)", lambda f: f(X, W, T, linear_bias=torch.randn(4))),
    (RuntimeError, "float64", lambda f: f(X, W.double(), T)),
    (RuntimeError, "(4,)", lambda f: f(X, W, T, weight=torch.ones(4))),
    (RuntimeError, "label_smoothing", lambda f: f(X, W, T, label_smoothing=1.5)),
    (RuntimeError, "ignore_index", lambda f: f(X, W, torch.rand(4, 5), ignore_index=0)),
    (ValueError, "reduction", lambda f: f(X, W, T, reduction="median")),
    (ValueError, "(3,)", lambda f: f(X, W, T[:3])),
    (IndexError, "7", lambda f: f(X, W, T + 5)),
    (TypeError, "list", lambda f: f(X, W, [0, 1, 2, 0])),
]


@pytest.mark.parametrize(("error", "told", "call"), BAD)
def test_bad_calls_raise_as_stock(error, told, call):
    stock = getattr(F, "linear_cross_entropy", by_stock)
    with pytest.raises((error, AttributeError) if error is TypeError else error):
        call(stock)
    with pytest.raises(error) as raised:
        call(ours)
    assert told in str(raised.value) or told == "7"


@pytest.mark.parametrize(
    ("error", "told", "options"),
    [
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "z_loss", {"z_loss": -1.0}),
        (ValueError, "chunk_size", {"chunk_size": 0}),
        (RuntimeError, "token_weight", {"token_weight": torch.ones(3)}),
        (RuntimeError, "token_weight", {"token_weight": torch.ones(4, requires_grad=True)}),
        (RuntimeError, "weight", {"weight": torch.ones(5, requires_grad=True)}),
    ],
)
def test_bad_options(error, told, options):
    with pytest.raises(error, match=told):
        ours(X, W, T, **options)


def test_log_probabilities_need_classes():
    with pytest.raises(ValueError, match="classes"):
        ours(X, W, torch.rand(4, 5), return_log_probs=True)


@pytest.mark.parametrize("counted", [0, 9, 70])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_cpu_computes_the_rows_that_count(counted, reduction):
    leaves, t = layer(80, 2**12, features=3, dtype=torch.float32)
    leaves, t = [leaf.detach().cpu().requires_grad_() for leaf in leaves], t.cpu()
    t[counted:] = IGNORED
    x, w, b = leaves
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            saved = ours(x, w, t, b, reduction=reduction).grad_fn.saved_tensors[0]
        assert len(saved) == (80 if counted == 70 else (t != IGNORED).sum())
    found, known = (gradients(f, leaves, t, reduction=reduction) for f in (ours, by_stock))
    torch.testing.assert_close(found, known, equal_nan=True)
