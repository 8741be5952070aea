"""PyTorch's own test samples, by ours and by stock: of every function of ours that has an OpInfo,
and of every module that has a ModuleInfo. They are found by name."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DEVICE
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_leaves, tree_map

import custom_backprop.functional as F
import custom_backprop.nn as nn

OPS = [
    (name, op)
    for name in F.__all__
    for op in op_db
    if op.name in (name, f"nn.functional.{name}") and torch.float64 in op.supported_dtypes(DEVICE)
]
MODULES = [
    (getattr(nn, info.module_cls.__name__), info)
    for info in module_db
    if info.module_cls.__name__ in nn.__all__
]

#: how many samples of an op are run, evenly spaced, and how many by the interpreter, which is slow
MOST, INTERPRETED = 64, 8

ops = pytest.mark.parametrize(("name", "op"), OPS, ids=[op.full_name for _, op in OPS])
modules = pytest.mark.parametrize(("ours", "info"), MODULES, ids=[i.name for _, i in MODULES])

# some samples are what stock warns of: a target that is broadcast, padding="same"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def few(samples, backend):
    samples = list(samples)
    most = INTERPRETED if backend == "triton" and DEVICE == "cpu" else MOST
    if len(samples) <= most:
        return samples
    step = (len(samples) - 1) / (most - 1)
    return [samples[round(i * step)] for i in range(most)]


def arguments(name, sample):
    """Positional and keyword arguments of a function."""
    args = (sample.input, *sample.args)
    if name in ("embedding", "embedding_bag"):  # their OpInfos put the weight first
        args = (args[1], args[0], *args[2:])
    return args, sample.kwargs


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def copied(tree):
    def copy_of(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return copy.deepcopy(value)

    return tree_map(copy_of, tree)


def generator_state():
    return (torch.cuda if DEVICE == "cuda" else torch).get_rng_state()


def result(call, args, kwargs):
    """Outputs, gradients of a weighted sum of them, what is left in arguments and buffers, and
    whether forward has drawn random numbers."""
    args, kwargs = copied((args, kwargs))
    before = generator_state()
    outputs = tensors(call(*args, **kwargs))
    random = not torch.equal(before, generator_state())
    given = tensors((args, kwargs))
    layer = isinstance(call, torch.nn.Module)
    wanted = [x for x in (*given, *(call.parameters() if layer else ())) if x.requires_grad]
    roots = [y for y in outputs if y.requires_grad]
    torch.manual_seed(1)
    dys = [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in roots]
    grads = torch.autograd.grad(roots, wanted, dys, allow_unused=True) if roots else ()
    buffers = list(call.buffers()) if layer else []
    return {"outputs": outputs, "gradients": grads, "left": [*given, *buffers]}, random


def assert_same(ours, stock, args, kwargs):
    """What stock draws is random, and then only shapes and dtypes can be equal: test_dropout.py
    recovers the masks and tests their statistics."""
    expected, random = result(stock, args, kwargs)
    actual, _ = result(ours, args, kwargs)
    for what, theirs in expected.items():
        assert len(actual[what]) == len(theirs), what
        for i, (a, e) in enumerate(zip(actual[what], theirs, strict=True)):
            which = f"{what}[{i}]"
            if a is None or e is None:  # autograd's None means zeros
                assert not any(x is not None and x.any() for x in (a, e)), which
            elif random:
                assert (a.shape, a.dtype) == (e.shape, e.dtype), which
            else:
                assert_close(a, e, equal_nan=True, msg=lambda m, which=which: f"{which}: {m}")


def outcome(call, *args):
    """What the call returns, or the exception it raises."""
    try:
        return call(*args)
    except Exception as error:
        return error


def assert_fails_alike(actual, expected, backend):
    """docs/differences.md: where stock looks for an index out of range, the kernels return NaN."""
    if backend == "triton" and isinstance(expected, IndexError) and tensors(actual):
        assert all(y.isnan().any() for y in tensors(actual))
    else:
        assert isinstance(actual, type(expected)), (actual, expected)


def test_every_function_but_one_has_samples():
    wanted = {n for n in F.__all__ if hasattr(torch.nn.functional, n) and not n.endswith("_")}
    assert wanted - {name for name, _ in OPS} <= {"dropout1d"}
    assert len(MODULES) > 40


@ops
def test_function(name, op, backend, device):
    ours, stock = getattr(F, name), getattr(torch.nn.functional, name)
    samples = few(op.sample_inputs(device, torch.float64, requires_grad=True), backend)
    assert samples
    for sample in samples:
        assert_same(ours, stock, *arguments(name, sample))


@pytest.mark.parametrize(
    ("name", "op"),
    [(name, op) for name, op in OPS if op.error_inputs_func is not None],
    ids=lambda value: getattr(value, "full_name", ""),
)
def test_functions_errors(name, op, backend, device):
    ours, stock = getattr(F, name), getattr(torch.nn.functional, name)
    for bad in op.error_inputs(device):
        args, kwargs = arguments(name, bad.sample_input)

        def run(function, args=args, kwargs=kwargs):
            return function(*copied(args), **copied(kwargs))

        expected = outcome(run, stock)
        assert isinstance(expected, Exception)
        assert_fails_alike(outcome(run, ours), expected, backend)


@modules
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_module(ours, info, training, backend, device):
    samples = info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=training
    )
    for sample in few(samples, backend):
        made = sample.constructor_input
        stock = info.module_cls(*made.args, **made.kwargs).to(device, torch.float64)
        layer = ours(*made.args, **made.kwargs).to(device, torch.float64)
        layer.load_state_dict(stock.state_dict())
        given = sample.forward_input
        assert_same(layer.train(training), stock.train(training), given.args, given.kwargs)


@pytest.mark.parametrize(
    ("ours", "info"),
    [(ours, info) for ours, info in MODULES if info.module_error_inputs_func is not None],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_errors(ours, info, training, backend, device):
    for bad in info.module_error_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=False, training=training
    ):
        sample = bad.module_error_input
        made, given = sample.constructor_input, sample.forward_input

        def run(kind, made=made, given=given, error_on=bad.error_on):
            layer = kind(*made.args, **made.kwargs).to(device, torch.float64).train(training)
            if error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                return None
            return layer(*copied(given.args), **copied(given.kwargs))

        # not every layer raises in evaluation, but then neither does ours
        assert_fails_alike(outcome(run, ours), outcome(run, info.module_cls), backend)
