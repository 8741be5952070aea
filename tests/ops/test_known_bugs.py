"""Bugs that other libraries of kernels shipped, one named test each. Where a bug may hide in any
op, the op database drives the test.

Elsewhere: test_launch.py (the wrong GPU), test_packaging.py (the import name), test_validate.py
(tests that cannot fail).
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
import sys

import pytest
import torch
import triton
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing import Make, cases, database
from custom_backprop.testing.case import gradients, outputs, weights_for
from custom_backprop.testing.regimes import both_ways, launches

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss"
)  # stock's own words on kl_div

SPECS = list(database().values())
F = torch.nn.functional
each_op = pytest.mark.parametrize("spec", SPECS, ids=str)
each_loss = pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.family in ("loss", "nll", "cross_entropy")], ids=str
)


def tensor(*shape, dtype=torch.float64, requires_grad=False):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)


def first_case(spec):
    return cases(spec, DEVICE)[0]


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)


@each_op
def test_backward_writes_no_input_and_a_second_one_agrees(spec, backend):
    case = first_case(spec)
    leaves = case.leaves
    before = [leaf.detach().clone() for leaf in leaves]
    results = outputs(case.call(*leaves))
    dys = weights_for(results)
    first = torch.autograd.grad(results, leaves, dys, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7)
    second = torch.autograd.grad(results, leaves, dys)
    assert all(map(torch.equal, second, kept))
    assert all(torch.equal(leaf, b) for leaf, b in zip(leaves, before, strict=True))


@each_loss
def test_reduction_none_meets_each_gradient_not_the_first(spec, backend):
    case = first_case(spec)
    leaves = case.leaves
    kwargs = {**case.kwargs, "reduction": "none"}
    ours, theirs = (
        lambda *a, f=f: f(*case._fill(a), **kwargs) for f in (case.function, case.reference)
    )
    (loss,), grads = gradients(ours, leaves)
    assert loss.numel() > 1
    same(grads, gradients(theirs, leaves)[1])


@each_loss
@pytest.mark.parametrize("dy", [1.0, 0.37, 0.0])
def test_no_shortcut_takes_the_gradient_for_one(spec, dy, backend):
    case = first_case(spec)
    leaves = case.leaves
    ours, theirs = (
        gradients(
            lambda *a, f=f: f(*a).mean() * dy,
            leaves,
            [torch.ones((), dtype=torch.float64, device=DEVICE)],
        )[1]
        for f in (case.call, case.call_reference)
    )
    same(ours, theirs)


@each_op
def test_a_sum_whose_gradient_has_stride_zero(spec, backend):
    case = first_case(spec)
    grads = []
    for f in (case.call, case.call_reference):
        leaves = case.leaves
        sum(r.sum() for r in outputs(f(*leaves))).backward()
        grads.append([leaf.grad for leaf in leaves])
    same(*grads)


def test_cross_entropy_takes_an_empty_batch(backend):
    x, target = tensor(0, 3, requires_grad=True), torch.empty(0, dtype=torch.long, device=DEVICE)
    loss = functional.cross_entropy(x, target)
    assert math.isnan(loss.item())
    loss.backward()
    assert x.grad.shape == (0, 3)
    assert functional.cross_entropy(x, target, reduction="sum").item() == 0


def test_a_batch_that_is_no_multiple_of_the_block(backend):
    x, target = tensor(2049, 3, requires_grad=True), torch.randint(3, (2049,), device=DEVICE)
    same(
        *(
            (loss, torch.autograd.grad(loss, x))
            for loss in (f(x, target) for f in (functional.cross_entropy, F.cross_entropy))
        )
    )
    a, b = tensor(2049, requires_grad=True), tensor(2049)
    same(
        *(
            (loss, torch.autograd.grad(loss, a))
            for loss in (f(a, b) for f in (functional.mse_loss, F.mse_loss))
        )
    )


def test_ignored_targets_add_nothing_and_index_no_weight(backend):
    x, weight = tensor(5, 4, requires_grad=True), torch.rand(4, dtype=torch.float64, device=DEVICE)
    target = torch.tensor([1, -100, 3, -100, 0], device=DEVICE)
    same(
        *(
            (loss, torch.autograd.grad(loss, x))
            for loss in (f(x, target, weight) for f in (functional.cross_entropy, F.cross_entropy))
        )
    )


def test_all_targets_ignored(backend):
    x, target = tensor(3, 4, requires_grad=True), torch.full((3,), -100, device=DEVICE)
    loss = functional.cross_entropy(x, target)
    loss.backward()
    stock = x.detach().clone().requires_grad_()
    F.cross_entropy(stock, target).backward()
    assert math.isnan(loss.item())
    same(x.grad, stock.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["softplus", "logsigmoid", "mish", "silu", "gelu", "sigmoid", "tanh", "elu"]
)
def test_far_from_zero(name, dtype, backend):
    far = [-100.0, -30.0, 30.0, 100.0]
    if name == "gelu" and dtype == torch.float64:
        far.remove(-30.0)  # stock's is 0 there, the true value is not: see test_tails.py
    x = torch.tensor(far, dtype=dtype, device=DEVICE, requires_grad=True)
    results = []
    for f, leaf in (
        (getattr(functional, name), x),
        (getattr(F, name, None) or getattr(torch, name), x.detach().double().requires_grad_()),
    ):
        y = f(leaf)
        y.backward(torch.ones_like(y))
        results.append((y.detach().double(), leaf.grad.double()))
    assert all(r.isfinite().all() for r in results[0])
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2 * eps, atol=tiny)
    torch.testing.assert_close(
        results[0][1], results[1][1], rtol=2 * eps, atol=eps
    )  # y (1 - y) is 0 where y rounds to 1, as in torch


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.family in ("activation", "softmax")], ids=str
)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_more_than_two_dimensions(spec, shape, backend):
    x = tensor(*shape)
    kwargs = {"dim": 1} if spec.family == "softmax" else first_case(spec).kwargs
    ours, theirs = (
        gradients(lambda t, f=f: f(t, **kwargs), [x.clone().requires_grad_()])
        for f in (spec.function, spec.reference)
    )
    same(ours, theirs)


def test_column_sums_of_bfloat16_are_made_in_float32(backend):
    """In bfloat16 a sum of ones stops at 256."""
    x, w = (
        torch.ones(1000, 2, dtype=torch.bfloat16, device=DEVICE),
        torch.ones(3, 2, dtype=torch.bfloat16, device=DEVICE),
    )
    b = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    w.requires_grad_()
    functional.linear(x, w, b).backward(torch.ones(1000, 3, dtype=torch.bfloat16, device=DEVICE))
    assert b.grad.tolist() == [1000.0] * 3
    assert w.grad.flatten().tolist() == [1000.0] * 6


def test_statistics_of_bfloat16_logits_are_kept_in_float32(backend):
    """A log-sum-exp rounded to bfloat16 would put the probabilities off by up to 2^-8 of a logit of
    20: by a tenth."""
    x = (20 + tensor(4, 9, dtype=torch.float32)).bfloat16().requires_grad_()
    target = torch.randint(9, (4,), device=DEVICE)
    dy = tensor(4, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(functional.cross_entropy(x, target, reduction="none"), x, dy)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(exact, target, reduction="none"), exact, dy.double()
    )
    torch.testing.assert_close(grad.double(), expected, rtol=2**-8, atol=2**-10)


def test_every_parameter_of_every_module_gets_a_gradient(backend):
    for spec in SPECS:
        if spec.module is None:
            continue
        ours, _, arguments, inputs = spec.module
        module = ours(**arguments).to(DEVICE, torch.float64)
        results = outputs(module(*inputs(Make(DEVICE))))
        torch.autograd.backward(results, weights_for(results))
        assert all(p.grad is not None and p.grad.count_nonzero() for p in module.parameters()), (
            spec.name
        )


def test_a_frozen_weight_costs_nothing(backend):
    """LoRA and fine-tuning freeze most weights: no product, no buffer and no copy of the input for
    a gradient nobody wants."""
    x, w = tensor(4, 5, requires_grad=True), tensor(3, 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        y = functional.linear(x, w)
    assert x.data_ptr() not in saved
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        y.backward(tensor(4, 3))
    shapes = [e.input_shapes for e in profile.function_events if e.name == "aten::mm"]
    assert [[3, 4], [4, 5]] not in [s[:2] for s in shapes], "dyᵀ x was computed"


def test_checkpoints_of_a_linear_layer_are_stock_ones():
    ours, stock = nn.Linear(5, 3), torch.nn.Linear(5, 3)
    assert isinstance(ours, torch.nn.Linear)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    assert list(nn.LinearActivation(5, 3).state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 5)
    torch.testing.assert_close(ours(x), stock(x))


def rows_far_apart(n, dtype=torch.float16):
    """Two rows, the second more than 2**31 elements behind the first. Memory that is never touched
    is never taken."""
    far = torch.empty(2**31 + 64, dtype=dtype, device=DEVICE).as_strided((2, n), (2**31 + 8, 1))
    return far.copy_(torch.randn(2, n))


@pytest.mark.parametrize(
    "op",
    [
        lambda f, x: f.softmax(x, -1),
        lambda f, x: f.cross_entropy(x, torch.tensor([1, 3], device=DEVICE), reduction="none"),
        lambda f, x: f.linear(x, torch.ones(3, 5, dtype=x.dtype, device=DEVICE)),
    ],
    ids=["softmax", "cross_entropy", "linear"],
)
def test_offsets_past_two_to_the_31(op):
    far = rows_far_apart(5)
    with custom_backprop.use_backend("triton"):
        ours = op(functional, far)
    torch.testing.assert_close(ours, op(F, far.clone()), rtol=2e-3, atol=2e-3)


def kernel_modules():
    return [
        kernels(m.name)
        for m in pkgutil.iter_modules(sys.modules["custom_backprop.triton_kernels"].__path__)
    ]


def test_the_grid_is_one_dimensional():
    """Axes y and z end at 65535."""
    assert "jit[(programs,)]" in inspect.getsource(kernels("launch"))
    for module in kernel_modules():
        assert not re.search(r"program_id\([^0]", inspect.getsource(module)), module.__name__


def test_a_float_argument_stays_as_exact_compiled_as_eager():
    """Inductor hands Python floats to a kernel as float64; ours are constants of the operator."""
    x = tensor(64, dtype=torch.float32)
    for f in (
        lambda t: functional.leaky_relu(t, 0.1),
        lambda t: functional.elu(t, 0.3),
        lambda t: functional.huber_loss(t, 0 * t, delta=0.3),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), f(x))
        assert compiled(x).dtype == torch.float32


def test_autocast_lowers_to_its_own_dtype():
    layer = nn.Linear(4, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(tensor(2, 4, dtype=torch.float16)).dtype == torch.bfloat16


@each_op
def test_no_launcher_reads_a_value(spec):
    """A value read on the host waits for the GPU, and no CUDA graph can hold it. Meta tensors have
    none to read."""
    sample = spec.large(Make("meta", torch.float32), "small")
    assert launches(lambda: both_ways(spec, sample))


def test_nothing_is_tuned_at_import():
    """An autotuner contacts the driver at its first use, hangs a first step, and lets ranks choose
    differently."""
    for module in kernel_modules():
        for name, value in vars(module).items():
            assert not isinstance(
                value, (triton.runtime.Autotuner, triton.runtime.autotuner.Heuristics)
            ), f"{module.__name__}.{name}"
