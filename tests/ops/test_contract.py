"""What an op promises beside what every check of the database asks."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from torch.utils._pytree import tree_leaves

from custom_backprop.testing import Make, cases, database
from custom_backprop.testing.case import Case, gradients, outputs
from custom_backprop.testing.checks.traced import Recorder

SPECS = list(database().values())
CASES = [
    pytest.param(spec, i, id=f"{spec}-{i}")
    for spec in SPECS
    for i in range(len(cases(spec, "meta")))
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_the_function_of_ours_runs(spec, i):
    """And not stock, to which some calls are left, with the same result."""
    case = cases(spec, DEVICE)[i]
    seen, left = set(), [y.grad_fn for y in outputs(case.call(*case.leaves))]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
    assert any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_the_result_is_the_same_whether_or_not_a_gradient_is_wanted(spec, i, backend):
    """What forward makes for backward takes another way to it."""
    for dtype in (torch.float64, *spec.low_precision):
        case = cases(spec, DEVICE)[i].to(dtype)
        wanted = [y.detach() for y in outputs(case.call(*case.leaves))]
        with torch.no_grad():
            alone = list(outputs(case.call(*case.leaves)))
        torch.testing.assert_close(
            alone, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True
        )


def other_strides(t):
    """The same values: every second of a wider buffer, and in the opposite order of dimensions."""
    wider = t.new_zeros((*t.shape, 3))
    yield wider[..., 1].copy_(t)
    if t.dim() > 1:
        yield t.mT.contiguous().mT


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_operators_take_tensors_of_any_strides(spec, i, backend):
    """Saved ones too, which forward makes contiguous: somebody may call an operator by name."""
    case = cases(spec, DEVICE)[i]
    with Recorder() as recorder:
        gradients(case.call, case.leaves)
    for operator, args, _ in recorder.calls.values():
        if operator._schema.is_mutable:
            continue
        # what else forward returns may be memory that nobody reads
        of = slice(1) if operator._schema.name.endswith("_forward") else slice(None)
        expected = tree_leaves(operator(*args))[of]
        for which, given in enumerate(args):
            if not isinstance(given, torch.Tensor) or not given.dim():
                continue
            for t in other_strides(given):
                found = tree_leaves(operator(*args[:which], t, *args[which + 1 :]))[of]
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS, ids=str)
class TestGradients:
    def case(self, spec):
        sample = spec.large(Make(DEVICE, torch.float32), "small")
        return Case(spec.function, spec.reference, sample.args, sample.kwargs)

    def test_backward_in_inference_mode(self, spec, backend):
        """As the first that there is, and where a hook switches it on."""
        case = self.case(spec)
        leaves = case.leaves
        y = outputs(case.call(*leaves))[0]
        w = torch.ones_like(y)
        expected = torch.autograd.grad(y.sum(), leaves)
        y = outputs(case.call(*leaves))[0]
        with torch.inference_mode():
            torch.testing.assert_close(torch.autograd.grad(y, leaves, w), expected)
        y = outputs(case.call(*leaves))[0]

        def hook(grad):
            with torch.inference_mode():
                return grad * 1

        y.register_hook(hook)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), expected)
