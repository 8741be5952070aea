"""nll_loss and cross_entropy against stock, on every backend: what the op database's small samples
do not meet."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.backends import BACKENDS, tasks, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.checks.compare import sliced, transposed
from custom_backprop.testing.regimes import launches

F = torch.nn.functional
NAMES = ("nll_loss", "cross_entropy")
each_name = pytest.mark.parametrize("name", NAMES)
IGNORED = -100
HERE = [b for b in BACKENDS if why_not(b, DEVICE) is None]
on_triton = pytest.mark.skipif("triton" not in HERE, reason="kernels do not run here")


def logits(*shape, dtype=torch.float64):
    return (3 * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype).requires_grad_()


def classes(*shape, high, ignored=0.0):
    t = torch.randint(high, shape, device=DEVICE)
    return torch.where(torch.rand(shape, device=DEVICE) < ignored, IGNORED, t)


def weights(n, dtype=torch.float64):
    return torch.rand(n, dtype=dtype, device=DEVICE) + 0.1


def permuted(t, order):
    """The same values, the dimensions lying in memory in the order given."""
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(*order).contiguous().permute(*back)


def agree(name, args, rtol=1e-9, atol=1e-11, dy=None, **options):
    """Ours against stock in float64: the loss, and the gradients of all that requires grad, under a
    random dy."""
    found = []
    for f, dtype in ((getattr(functional, name), None), (getattr(F, name), torch.float64)):
        cast = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and dtype else v
            for k, v in options.items()
        }
        given = [a.to(dtype or a.dtype) if a.is_floating_point() else a for a in args]
        given = (
            [a.contiguous() for a in given] if dtype else given
        )  # stock's nll_loss of 4-D raises in backward where x is not
        leaves = [
            a.detach().requires_grad_(b.requires_grad) for a, b in zip(given, args, strict=True)
        ]
        loss = f(*leaves, **cast)
        torch.manual_seed(5)
        weight = (
            torch.randn(loss.shape, dtype=torch.float64).to(loss)
            if dy is None
            else torch.full_like(loss, dy)
        )
        grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], weight)
        found.append((loss.detach().double(), *(g.double() for g in grads)))
    torch.testing.assert_close(*found, rtol=rtol, atol=atol, equal_nan=True)
    return found[0]


@each_name
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_weight_of_an_ignored_class_is_not_read(name, reduction, backend):
    x, target = logits(7, 4), classes(7, high=4)
    target[::3] = IGNORED
    agree(name, (x, target), weight=weights(4), reduction=reduction)
    agree(name, (x, target.clamp_min(0)), weight=weights(4), reduction=reduction, ignore_index=2)


@each_name
@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)}]
)
def test_all_ignored_is_a_loss_of_nan_and_no_gradient(name, options, backend):
    options = {k: v.to(DEVICE) for k, v in options.items()}
    x, target = logits(5, 3), classes(5, high=3, ignored=1.0)
    loss, dx = agree(name, (x, target), **options)
    assert loss.isnan()
    assert not dx.any()
    if name == "cross_entropy":
        agree(name, (x, target), label_smoothing=0.1, **options)


@each_name
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)])
def test_no_rows(name, shape, backend):
    target = classes(shape[0], *shape[2:], high=3)
    for reduction in ("none", "mean", "sum"):
        agree(name, (logits(*shape), target), reduction=reduction)
    if name == "cross_entropy":
        for reduction in ("none", "mean", "sum"):
            agree(
                name,
                (logits(*shape), torch.rand(shape, device=DEVICE, dtype=torch.float64)),
                reduction=reduction,
            )


def test_no_classes():
    x = logits(2, 0)
    ignored = torch.full((2,), IGNORED, device=DEVICE)
    assert functional.cross_entropy(x, ignored).isnan()
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            functional.cross_entropy(x, torch.zeros_like(ignored))


@each_name
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_that_no_block_divides(name, reduction, backend):
    agree(name, (logits(2049, 3), classes(2049, high=3, ignored=0.1)), reduction=reduction)


@each_name
def test_each_row_has_its_own_dy(name, backend):
    agree(name, (logits(6, 5), classes(6, high=5)), reduction="none")
    agree(name, (logits(2, 5, 3), classes(2, 3, high=5)), reduction="none", weight=weights(5))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_logits_are_not_overwritten(dtype, backend):
    x, target = logits(9, 5, dtype=dtype), classes(9, high=5)
    before, version = x.detach().clone(), x._version
    for reduction in ("mean", "none"):
        loss = functional.cross_entropy(x, target, reduction=reduction)
        loss.backward(torch.ones_like(loss))
    assert torch.equal(x, before)
    assert x._version == version


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_lose_nothing(offset, options, backend):
    x, target = logits(5, 7, dtype=torch.float32), classes(5, high=7)
    with torch.no_grad():
        x += offset
    agree("cross_entropy", (x, target), rtol=3e-5, atol=1e-6, **options)
    wide = (1e4 * torch.randn(5, 7, device=DEVICE)).requires_grad_()
    agree("cross_entropy", (wide, target), rtol=3e-5, atol=1e-6, **options)


@pytest.mark.parametrize("keep", ["mean", "none"])
def test_infinite_logits_give_what_stock_gives(keep, backend):
    x, target = logits(6, 4).detach(), torch.tensor([0, 1, 2, 3, 0, 1], device=DEVICE)
    x[0, 1] = x[1, 1] = x[2, :2] = x[3] = -torch.inf
    x[4, 2] = torch.inf
    for rows in ([0], [1], [2], [0, 2, 5], [3], [4]):
        for options in ({}, {"label_smoothing": 0.1}):
            agree(
                "cross_entropy",
                (x[rows].requires_grad_(), target[rows]),
                reduction=keep,
                dy=1.0,
                **options,
            )


@pytest.mark.parametrize(
    ("smoothing", "weighted", "ignored", "reduction"),
    [*itertools.product((0.0, 0.3, 1.0), (False, True), (0.0, 0.4), ("none", "mean", "sum"))],
)
def test_smoothing_weight_and_ignored(smoothing, weighted, ignored, reduction, backend):
    weight = weights(4) if weighted else None
    target = classes(5, high=4, ignored=ignored)
    agree(
        "cross_entropy",
        (logits(5, 4), target),
        label_smoothing=smoothing,
        weight=weight,
        reduction=reduction,
    )


@each_name
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 5, 3, 2), (2, 5, 2, 1, 3)], ids=str)
def test_dimensions(name, shape, reduction, backend):
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    x, target = logits(*shape), classes(*rows, high=5)
    agree(name, (x, target), reduction=reduction, weight=weights(5))
    if len(shape) == 1:  # stock takes one target of one dimension too, but its backward then raises
        f = functools.partial(getattr(functional, name), x, reduction=reduction)
        torch.testing.assert_close(f(target.view(1)), f(target), rtol=0, atol=0)
    order = (0, *range(2, len(shape)), 1) if len(shape) > 1 else (0,)
    agree(name, (permuted(x.detach(), order).requires_grad_(), target), reduction=reduction)
    agree(name, (sliced(x.detach()).requires_grad_(), target), reduction=reduction)


def test_the_gradient_has_the_layout_of_the_logits(backend):
    x = permuted(logits(2, 5, 3, 2).detach(), (0, 2, 3, 1)).requires_grad_()
    assert x.is_contiguous(memory_format=torch.channels_last)
    for reduction in ("mean", "none"):
        loss = functional.cross_entropy(x, classes(2, 3, 2, high=5), reduction=reduction)
        (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 3), (2, 4, 1, 2)], ids=str)
def test_probabilities(shape, reduction, backend):
    q = torch.rand(shape, dtype=torch.float64, device=DEVICE)
    for wanted in (True, False):
        for options in ({}, {"weight": weights(4), "label_smoothing": 0.2}):
            agree(
                "cross_entropy",
                (logits(*shape), q.clone().requires_grad_(wanted)),
                reduction=reduction,
                **options,
            )
    target = transposed(q).requires_grad_()
    agree("cross_entropy", (logits(*shape), target), reduction=reduction)


def test_probabilities_alone_are_differentiated(backend):
    agree(
        "cross_entropy",
        (
            logits(3, 4).detach(),
            torch.rand(3, 4, dtype=torch.float64, device=DEVICE).requires_grad_(),
        ),
    )


def test_the_weight_has_a_gradient_beside_probabilities(backend):
    x, q = logits(3, 4, 2), torch.rand(3, 4, 2, dtype=torch.float64, device=DEVICE)
    weight = weights(4).requires_grad_()
    grads = [
        torch.autograd.grad(f(x, q, weight, label_smoothing=0.1), (x, weight))
        for f in (functional.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_probabilities_of_another_dtype(x, q, backend):
    logits_, target = logits(3, 4, dtype=x), torch.rand(3, 4, device=DEVICE).to(q)
    ours, stock = (
        f(logits_, target, reduction="sum") for f in (functional.cross_entropy, F.cross_entropy)
    )
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=1e-2 if x == torch.bfloat16 else 1e-5, atol=0)
    assert torch.autograd.grad(ours, logits_)[0].dtype == x


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_wide_row(reduction, backend):
    x, target = logits(2, 70001, dtype=torch.float32), classes(2, high=70001)
    agree("cross_entropy", (x, target), rtol=1e-4, atol=1e-7, reduction=reduction)
    agree(
        "cross_entropy", (x, target), rtol=1e-4, atol=1e-7, reduction=reduction, label_smoothing=0.1
    )


def test_many_chunks_on_a_cpu(monkeypatch):
    """More than the chunk of the CPU's walk holds, the last one shorter."""
    monkeypatch.setattr(tasks, "WHOLE", 0)
    with custom_backprop.use_backend("aten"):
        for shape in ((1100, 1000), (3, 1000, 300)):
            x, target = (
                logits(*shape, dtype=torch.float32),
                classes(shape[0], *shape[2:], high=1000, ignored=0.1),
            )
            for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}):
                agree(
                    "cross_entropy",
                    (x, target),
                    rtol=1e-4,
                    atol=1e-7,
                    weight=weights(1000, torch.float32),
                    **options,
                )
            for reduction in ("none", "mean", "sum"):
                ours, stock = (
                    f(x.detach(), target, reduction=reduction)
                    for f in (functional.cross_entropy, F.cross_entropy)
                )
                torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dy", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_of_a_retained_graph_has_the_bits_of_a_freed_one(dy, dtype, backend):
    x, target = logits(6, 5, dtype=dtype), classes(6, high=5)
    dy = torch.tensor(dy, dtype=dtype, device=DEVICE)
    loss = functional.cross_entropy(x, target)
    first = torch.autograd.grad(loss, x, dy, retain_graph=True)[0]
    again = torch.autograd.grad(loss, x, dy, retain_graph=True)[0]
    last = torch.autograd.grad(loss, x, dy)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, last)


@each_name
@pytest.mark.parametrize("wrong", [3, -1, 2**32 + 1])
def test_a_class_out_of_range(name, wrong, backend):
    """IndexError where ATen looks; NaN, and no reading out of bounds, where nobody can without
    waiting for the device."""
    if backend == "aten" and DEVICE != "cpu":
        pytest.skip("ATen's own kernels stop a GPU")
    x, target = logits(2, 3), torch.tensor([1, wrong], device=DEVICE)
    for options in (
        {},
        {"weight": weights(3)},
        *([{"label_smoothing": 0.1}] if name == "cross_entropy" else []),
    ):
        none, mean = (
            functools.partial(getattr(functional, name), x, target, reduction=r, **options)
            for r in ("none", "mean")
        )
        if backend == "aten":
            for call in (none, mean):
                with pytest.raises(IndexError, match=f"{wrong} is out of bounds"):
                    call()
            continue
        (dx,) = torch.autograd.grad(none(), x, torch.ones(2, dtype=x.dtype, device=DEVICE))
        assert none().isnan().tolist() == [False, True]
        assert dx.isnan().any(1).tolist() == [False, True]
        assert mean().isnan()


X, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
CUBE = torch.zeros(1, 3, 4)
BAD = {
    "0-D input": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "a batch too short": ((X, T[:3]), {}),
    "a target without dimensions": ((X, T[0]), {}),
    "two targets a row": ((X, T[:, None]), {}),
    "four targets for one row": ((X[0], T), {}),
    "3-D, a target of the batch alone": ((CUBE, T[:1]), {}),
    "3-D, rows too few": ((CUBE, T[None, :3]), {}),
    "3-D, another batch": ((CUBE, T[:2, None]), {}),
    "4-D, rows too few": ((CUBE.view(1, 3, 2, 2), T[None]), {}),
    "classes in the shape of the input": ((X, torch.zeros(4, 3, dtype=torch.int64)), {}),
    "a weight too long": ((X, T), {"weight": torch.ones(4)}),
    "a weight of two dimensions": ((X, T), {"weight": torch.ones(1, 3)}),
    "a weight of another dtype": ((X, T), {"weight": torch.ones(3, dtype=torch.float64)}),
    "a weight that requires grad": ((X, T), {"weight": torch.ones(3, requires_grad=True)}),
    "int32 classes": ((X, T.int()), {}),
    "float classes": ((X, T.float()), {}),
    "bool classes": ((X, T.bool()), {}),
    "uint8 classes of 3-D": ((CUBE, T[None].byte()), {}),
    "an integer input": ((torch.zeros(4, 3, dtype=torch.int64), T), {}),
    "a complex input": ((X.cfloat(), T), {}),
    "an unknown reduction": ((X, T), {"reduction": "average"}),
    "another device": ((X, T.to("meta")), {}),
}
BAD_PROBABILITIES = {
    "ignore_index beside probabilities": ((X, X), {"ignore_index": 1}),
    "a weight too long beside probabilities": ((X, X), {"weight": torch.ones(4)}),
    "a weight of one beside probabilities": ((X, X), {"weight": torch.ones(1)}),
    "probabilities of another shape": ((X, torch.zeros(4, 4)), {}),
    "smoothing above one": ((X, T), {"label_smoothing": 1.5}),
}


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [(n, *BAD[case]) for n, case in itertools.product(NAMES, BAD)]
    + [("cross_entropy", *case) for case in BAD_PROBABILITIES.values()],
    ids=[f"{n}: {case}" for n, case in itertools.product(NAMES, BAD)] + list(BAD_PROBABILITIES),
)
def test_bad_arguments_raise_what_stock_raises(name, args, options):
    args = [a.clone().requires_grad_(a.is_floating_point() or a.is_complex()) for a in args]
    errors = []
    for f in (getattr(F, name), getattr(functional, name)):
        with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)) as caught:
            f(*args, **options)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize(
    ("size_average", "reduce"), [*itertools.product((None, True, False), repeat=2)]
)
@each_name
def test_the_deprecated_forms_of_reduction(name, size_average, reduce):
    x, target = logits(4, 3), classes(4, high=3)
    options = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(name, (x, target), **options)


@each_name
def test_uint8_classes(name, backend):
    target = torch.tensor([1, 0, 255, 2], dtype=torch.uint8, device=DEVICE)
    agree(name, (logits(4, 256), target))
    agree(name, (logits(4, 3), target), ignore_index=255)


def test_smoothing_below_zero_is_none(backend):
    agree("cross_entropy", (logits(4, 3), classes(4, high=3)), label_smoothing=-0.1)


@each_name
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(name, autocast, backend):
    for dtype in (torch.bfloat16, torch.float16):
        x, target, weight = (
            logits(7, 5, dtype=dtype),
            classes(7, high=5, ignored=0.2),
            weights(5, torch.float32 if autocast else dtype),
        )
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = getattr(functional, name)(x, target, weight)
        assert loss.dtype == (torch.float32 if autocast else dtype)
        exact = x.detach().double().requires_grad_()
        expected = getattr(F, name)(exact, target, weight.double())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x)[0].double(),
            torch.autograd.grad(expected, exact)[0],
            rtol=2e-2,
            atol=1e-3,
        )


def test_modules_pass_everything_on():
    x, target, weight = logits(4, 3), classes(4, high=3, ignored=0.3), weights(3)
    options = {"weight": weight, "ignore_index": 1, "reduction": "sum"}
    for ours, stock, more in (
        (nn.NLLLoss, torch.nn.NLLLoss, {}),
        (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss, {"label_smoothing": 0.2}),
    ):
        target = target.where(target != IGNORED, 1)
        torch.testing.assert_close(
            ours(**options, **more)(x, target), stock(**options, **more)(x, target)
        )


@settings(max_examples=15, derandomize=True, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("forced", [b for b in BACKENDS if why_not(b, DEVICE) is None])
def test_any_shape(forced, data):
    rows, n_classes, rest = (
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 6)),
        data.draw(st.lists(st.integers(1, 3), max_size=2)),
    )
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, target = logits(rows, n_classes, *rest), classes(rows, *rest, high=n_classes, ignored=0.2)
    options = {
        "weight": weights(n_classes) if data.draw(st.booleans()) else None,
        "reduction": data.draw(st.sampled_from(("none", "mean", "sum"))),
        "label_smoothing": data.draw(st.sampled_from((0.0, 0.1))),
    }
    with custom_backprop.use_backend(forced):
        agree("cross_entropy", (x, target), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch_without_gradient(dtype, reduction, backend):
    x, t = (
        torch.zeros(0, 5, dtype=dtype, device=DEVICE),
        torch.zeros(0, dtype=torch.int64, device=DEVICE),
    )
    ours, theirs = (
        m.cross_entropy(x, t, reduction=reduction) for m in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4), (3, 4, 5), (2, 4, 5, 1)])
def test_a_target_of_another_shape(shape, backend):
    x, t = (
        torch.randn(2, 3, 4, 5, device=DEVICE),
        torch.zeros(shape, dtype=torch.int64, device=DEVICE),
    )
    for module in (functional, torch.nn.functional):
        with pytest.raises((RuntimeError, ValueError)):
            module.cross_entropy(x, t)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2])
def test_any_class_may_be_ignored(ignore_index, backend):
    x = torch.randn(6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    t = torch.tensor([0, 1, 2, 0, 1, 2], device=DEVICE)
    ours, theirs = (
        m.cross_entropy(x, t, ignore_index=ignore_index) for m in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("n", [5, 20001])
def test_nan_stays_in_its_row(n, backend):
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("none", "sum")):
        x = logits(3, n, dtype=dtype).detach()
        x[1, 3] = float("nan")
        x.requires_grad_()
        loss = functional.cross_entropy(x, classes(3, high=3), reduction=reduction)
        (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert loss.isnan().tolist() == ([False, True, False] if reduction == "none" else True)
        assert dx.isnan().sum(1).tolist() == [0, n, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [5, 20001])
def test_a_row_may_be_masked_with_the_lowest_number(n, dtype, backend):
    x = torch.zeros(2, n, dtype=dtype, device=DEVICE)
    x[0] = torch.finfo(dtype).min
    x[1, 3:] = torch.finfo(dtype).min
    x.requires_grad_()
    t = torch.tensor([1, 1], device=DEVICE)
    losses = functional.cross_entropy(x, t, reduction="none")
    (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    expected = torch.tensor([n, 3.0]).log()
    torch.testing.assert_close(losses.float().cpu(), expected, rtol=4e-3, atol=0)
    assert dx[1, 3:].count_nonzero() == 0
    torch.testing.assert_close(dx[:, 0].float().cpu(), (-expected).exp(), rtol=4e-3, atol=0)


LONG = [2**k + d for k in range(15, 19) for d in (-1, 0, 1)]


@on_triton
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("n", LONG)
@pytest.mark.parametrize("switch", ["", "1"])
def test_rows_that_blocks_share(n, options, switch, switched):
    """On a GPU that has clusters, and then, without, in a loop: the target's logit is the first,
    the last or among others; a row is ignored; dx is written over the logits too."""
    if not kernels("launch").has_clusters(torch.device(DEVICE)):
        pytest.skip("there are no clusters of blocks here")
    switched(switch)
    x = logits(300, n, dtype=torch.bfloat16)
    target = classes(300, high=n)
    target[0], target[1], target[2] = 0, n - 1, IGNORED
    agree("cross_entropy", (x, target), rtol=2**-7, atol=2**-7 / n, **options)
    module, smoothing = kernels("cross_entropy"), options.get("label_smoothing", 0.0)
    of = target, None, 0, IGNORED, smoothing, module.GRADIENT, None
    apart, over = x.detach().clone(), x.detach().clone()
    losses, dx = module.forward(apart, *of)
    assert torch.equal(module.forward(over, *of, over)[0], losses)
    assert torch.equal(over, dx)


@on_triton
def test_which_rows_blocks_share(switched, monkeypatch):
    """Those longer than 8192 of a GPU that has clusters, up to 2^18; where each number has its
    share of a target, those of 8192 too, up to 2^17. Never in float64, nor side by side, nor where
    sums were made before."""
    launch, module, seen = kernels("launch"), kernels("cross_entropy"), []
    monkeypatch.setattr(launch, "_TRITON", (3, 9))

    def blocks(capability, *shape, smoothing=0.0, dtype=torch.bfloat16):
        x = torch.empty(shape, device="meta", dtype=dtype)
        target = torch.empty(shape[0], *shape[2:], device="meta", dtype=torch.int64)
        of = target, None, 0, IGNORED, smoothing
        observer = launch.observed(lambda *call: seen.append(call[-1].get("num_ctas", 1)))
        with launch.meta_capability(capability), observer:
            losses, statistics = module.forward(x, *of, module.STATISTICS)
            module.backward(losses, x, target, None, statistics, *of[2:], True, False)
        forward, backward = seen[-2:]
        assert backward == 1
        return forward

    switched("")
    sizes = (8192, 8193, 2**15, 2**15 + 1, 2**16, 2**17, 2**18, 2**18 + 1)
    assert [blocks(90, 4, n) for n in sizes] == [1, 2, 4, 8, 8, 16, 16, 1]
    soft = [blocks(90, 4, n, smoothing=0.1) for n in sizes]
    assert soft == [2, 4, 8, 16, 16, 16, 1, 1]
    assert blocks(90, 4, 2**15, dtype=torch.float64) == 1
    assert blocks(90, 4, 2**15, 2) == 1
    assert blocks(80, 4, 2**15) == blocks(0, 4, 2**15) == 1
    switched("1")
    assert blocks(90, 4, 2**15) == 1


@on_triton
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(1, 5, 127), (1, 3, 129), (3, 7, 100), (2, 1, 65)], ids=str)
def test_rows_side_by_side(shape, reduction, monkeypatch):
    """Around the 128 rows of a tile, in offsets of both widths."""
    rows, plan = kernels("rows"), kernels("cross_entropy").plan
    x, target = logits(*shape), classes(shape[0], shape[2], high=shape[1], ignored=0.2)
    for far in (rows.far, lambda extent: True):
        plan.cache_clear()
        monkeypatch.setattr(rows, "far", far)
        with custom_backprop.use_backend("triton"):
            agree("cross_entropy", (x, target), weight=weights(shape[1]), reduction=reduction)
    plan.cache_clear()


@on_triton
@pytest.mark.parametrize("rows", [64, 2**16])
@pytest.mark.parametrize(("name", "options"), [*itertools.product(NAMES, ({}, {"weight": True}))])
def test_launches_of_a_mean(name, options, rows):
    """Two; one more for a gradient, where there are too many rows for each program to sum their
    weights; and one in backward."""
    for requires_grad in (False, True):
        x = torch.empty(rows, 1000, device="meta", requires_grad=requires_grad)
        target = torch.empty(rows, dtype=torch.int64, device="meta")
        weight = torch.empty(1000, device="meta") if options else None

        def run(x=x, target=target, weight=weight):
            loss = getattr(functional, name)(x, target, weight=weight, ignore_index=1)
            if x.requires_grad:
                loss.backward()

        more = (rows > 1024 and name == "cross_entropy") + 1 if requires_grad else 0
        assert len(launches(run)) == 2 + more
