"""Every module is stock's, from the specs: built with every argument away from its default, so that
an argument that does not reach the function is seen."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE

from custom_backprop.testing import Make, database

SPECS = [s for s in database().values() if s.module is not None]
SETS = [
    pytest.param(spec, arguments, id=f"{spec}-{i}")
    for spec in SPECS
    for i, arguments in enumerate((spec.module[2], *spec.module_variants))
]
#: PyTorch's deprecated names for others, where parameters are made and of what, and what a result
#: takes of memory, which it does not show
NOT_MET = {
    "size_average", "reduce", "min_value", "max_value", "device", "dtype", "options", "_weight",
    "_freeze", "recompute",
}  # fmt: skip
#: (module, argument) that stock's own forward ignores
IGNORED = {("AlphaDropout", "inplace"), ("FeatureAlphaDropout", "inplace")}


def parameters_of(constructor):
    """The parameters of a constructor, and of its base's where it hands them on."""
    found = {}
    for base in constructor.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p)
        if not any(p.kind == p.VAR_POSITIONAL for p in parameters):
            break
    return {name: p for name, p in found.items() if name not in NOT_MET}


def built(constructor, arguments):
    torch.manual_seed(7)
    module = constructor(**arguments).to(DEVICE, torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    return module


def outcome(module, inputs):
    """The output, the gradients, and the inputs and buffers, which may be written over."""
    module = copy.deepcopy(module)
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    given = [t.clone() for t in leaves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of kl_div's mean
        y = module(*given)
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    torch.manual_seed(3)
    grads = torch.autograd.grad(y, wanted, torch.randn_like(y), allow_unused=True)
    written = [*[t.detach() for t in given], *module.buffers()]
    return [y.detach(), *written, *[g for g in grads if g is not None]]


def differ(some, others):
    return len(some) != len(others) or any(
        a.shape != b.shape or a.layout != b.layout or not torch.equal(a.to_dense(), b.to_dense())
        for a, b in zip(some, others, strict=True)
    )


def away_from_default(name, value, parameters):
    default = parameters[name].default if name in parameters else inspect.Parameter.empty
    return default is inspect.Parameter.empty or isinstance(value, torch.Tensor) or value != default


@pytest.mark.parametrize(("spec", "arguments"), SETS)
def test_a_module_is_stocks(spec, arguments, backend):
    ours, stock, _, make_inputs = spec.module
    mine, inputs = built(ours, arguments), make_inputs(Make(DEVICE, torch.float64))
    assert isinstance(mine, torch.nn.Module)
    found = outcome(mine, inputs)
    again = pickle.loads(pickle.dumps(mine))
    torch.testing.assert_close(outcome(again, inputs), found, rtol=0, atol=0)
    if not arguments.keys() <= parameters_of(stock).keys() and issubclass(ours, stock):
        return  # an argument of ours alone
    theirs = built(stock, arguments)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    if issubclass(ours, stock):
        assert repr(mine) == repr(theirs)
    # stock's hardsigmoid multiplies by 1/6 in float32
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(outcome(mine, inputs), outcome(theirs, inputs), **close)


@pytest.mark.parametrize(("spec", "arguments"), SETS)
def test_every_argument_of_a_set_matters(spec, arguments):
    """Each is away from its default, and without it the result is another, or the inputs do not
    fit."""
    ours, _, _, make_inputs = spec.module
    parameters, inputs = parameters_of(ours), make_inputs(Make(DEVICE, torch.float64))
    found = outcome(built(ours, arguments), inputs)
    for name in arguments:
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            continue
        assert away_from_default(name, arguments[name], parameters), name
        fewer = {k: v for k, v in arguments.items() if k != name}
        if name == "activation":
            fewer = {k: v for k, v in fewer.items() if k in parameters}
        try:
            without = outcome(built(ours, fewer), inputs)
        except RuntimeError:
            continue
        matters = (ours.__name__, name) not in IGNORED
        assert differ(without, found) == matters, name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_argument_is_in_a_set(spec):
    ours, _, arguments, _ = spec.module
    met = {name for given in (arguments, *spec.module_variants) for name in given}
    assert parameters_of(ours).keys() <= met


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_defaults_are_those_of_the_function(spec):
    """Where both have one. ``bias`` is a flag of a module and a tensor of a function."""
    of_function = inspect.signature(spec.function).parameters
    for name, p in parameters_of(spec.module[0]).items():
        both = name in of_function and of_function[name].default is not p.empty and name != "bias"
        if both and p.default is not p.empty:
            assert p.default == of_function[name].default, name
