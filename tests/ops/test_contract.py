"""What an op promises of the tensors that it returns, and of those that it was given."""

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
def test_an_output_may_be_changed_in_place(spec, i, backend):
    """As stock's may: ``loss /= 4``, ``losses *= mask``, ``linear(x).relu_()``. It is no view that
    was made inside a Function, and nothing that backward reads unless stock says so too."""
    case = cases(spec, DEVICE)[i]
    found = []
    for call in (case.call_reference, case.call):
        leaves = case.leaves
        y = outputs(call(*leaves))[0]
        try:
            y.mul_(2)
            found.append((y, *torch.autograd.grad(y.sum(), leaves)))
        except RuntimeError as error:  # such as an output that backward reads
            if "modified by an inplace operation" not in str(error):
                raise
            found.append(None)
    stock, ours = found
    if spec.reads_output:
        assert ours is None, "a gradient of what is no longer there"
    elif stock is not None:
        assert ours is not None, "stock lets it pass"
        torch.testing.assert_close(ours, stock)


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

    def test_is_a_tensor_of_its_own(self, spec, backend):
        case = self.case(spec)
        leaves = case.leaves
        results = outputs(case.call(*leaves))
        dys = [torch.randn_like(y) for y in results]
        before = [dy.clone() for dy in dys]
        grads = torch.autograd.grad(results, leaves, dys)
        assert not {g.data_ptr() for g in grads} & {t.data_ptr() for t in (*dys, *leaves)}
        stocks = torch.autograd.grad(outputs(case.call_reference(*leaves)), leaves, dys)
        # those of a sum are one tensor
        assert len({g.data_ptr() for g in grads}) >= len({g.data_ptr() for g in stocks})
        assert all(map(torch.equal, dys, before))
        for g in torch.autograd.grad([y.sum() for y in outputs(case.call(*leaves))], leaves):
            assert not g.requires_grad
            assert g.grad_fn is None

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
