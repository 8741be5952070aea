"""What an op promises of the tensors that it returns, and of those that it was given."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE

from custom_backprop import functional
from custom_backprop.testing import cases, database

CASES = [
    pytest.param(spec, i, id=f"{spec}-{i}")
    for spec in database().values()
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
        y = call(*leaves)
        try:
            y.mul_(2)
            found.append((y, *torch.autograd.grad(y.sum(), leaves)))
        except RuntimeError as error:  # such as an output that backward reads
            if "modified by an inplace operation" not in str(error):
                raise
            found.append(None)
    stock, ours = found
    if stock is not None:
        assert ours is not None, "stock lets it pass"
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("shape", [(4, 4), (256, 256)])
@pytest.mark.parametrize(
    "name", ["relu", "sigmoid", "tanh", "softmax", "log_softmax", "softsign", "gelu"]
)
class TestGradients:
    def call(self, name, x):
        return getattr(functional, name)(x, *([1] if "softmax" in name else []))

    def test_is_a_tensor_of_its_own(self, name, shape, backend):
        x, dy = torch.randn(2, *shape, device=DEVICE).unbind()
        x.requires_grad_()
        dy, before = dy.clone(), dy.clone()
        (dx,) = torch.autograd.grad(self.call(name, x), x, dy)
        assert dx is not dy
        assert dx.data_ptr() not in (dy.data_ptr(), x.data_ptr())
        assert torch.equal(dy, before)
        (dx,) = torch.autograd.grad(self.call(name, x).sum(), x)
        assert not dx.requires_grad
        assert dx.grad_fn is None

    def test_backward_in_inference_mode(self, name, shape, backend):
        """As the first that there is, and where a hook switches it on."""
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        expected, w = torch.autograd.grad(self.call(name, x).sum(), x), torch.ones_like(x)
        y = self.call(name, x)
        with torch.inference_mode():
            torch.testing.assert_close(torch.autograd.grad(y, x, w), expected)
        y = self.call(name, x)

        def hook(grad):
            with torch.inference_mode():
                return grad * 1

        y.register_hook(hook)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)
