"""The dtypes that autocast gives each op on a GPU are stock's. The tensors are fake, which needs no
GPU: torch's dispatcher casts them by its lists all the same."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from custom_backprop.formulas.activation import ACTIVATIONS
from custom_backprop.testing import Make, Sample, database
from custom_backprop.testing.case import is_float

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None, reason="torch was built for no GPU, and would abort the process"
    ),
    pytest.mark.filterwarnings("ignore:.*('mean' divides|different to the input size)"),
]

SPECS = list(database().values())
HALVES = (torch.bfloat16, torch.float16)
#: dtypes of the first tensor and of the others
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    *((half, half) for half in HALVES),
    *((half, torch.float32) for half in HALVES),
]
lower_precision = pytest.mark.parametrize("lower", HALVES, ids=str)


@contextmanager
def autocast(lower):
    """To ``lower``, on a GPU that may be fake: torch.autocast would refuse it."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", lower)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def cast(sample, first, others):
    """The sample's call with its first tensor of one dtype, the others of another."""
    x, *rest = sample.args
    x, *rest = x.to(first), *(a.to(others) if is_float(a) else a for a in rest)
    return (x, *rest), {k: a.to(others) if is_float(a) else a for k, a in sample.kwargs.items()}


def outcome(function, args, kwargs):
    """The dtype of the result, or why there is none."""
    try:
        return function(*args, **kwargs).dtype
    except DataDependentOutputException:
        return "reads a value"
    except RuntimeError as error:
        if "unsafe to autocast" not in str(error):
            raise
        return "refused"


def assert_dtypes_are_stocks(spec, samples, lower):
    for sample in samples:
        for dtypes in DTYPES:
            args, kwargs = cast(sample, *dtypes)
            for grad in (True, False):
                with autocast(lower), torch.set_grad_enabled(grad):
                    ours, theirs = (
                        outcome(f, args, kwargs) for f in (spec.function, spec.reference)
                    )
                if theirs != "reads a value":  # a fake tensor has none
                    assert ours == theirs, (sample.name, dtypes, grad)


@lower_precision
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dtypes_are_stocks(spec, lower):
    """Of every sample and of every branch of the kernels, with a gradient and without."""
    with FakeTensorMode():
        make = Make("cuda")
        assert_dtypes_are_stocks(spec, [*spec.samples(make), *spec.regimes(make)], lower)


@lower_precision
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtypes_of_a_layer_and_its_activation_are_stocks(name, lower):
    given = {p: 0.5 if d is None else d for p, d in ACTIVATIONS[name].parameters.items()}
    with FakeTensorMode():
        tensors = tuple(Make("cuda").tensor(*shape) for shape in ((2, 3), (4, 3), (4,)))
        samples = [Sample(tensors[:n], {"activation": name, **given}) for n in (2, 3)]
        assert_dtypes_are_stocks(database()["linear_activation"], samples, lower)
