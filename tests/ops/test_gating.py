"""The gates beyond what the op database asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from custom_backprop import functional


@pytest.mark.parametrize(
    ("x", "dim", "error"),
    [
        (torch.ones(3), 0, RuntimeError),
        (torch.ones(4), 3, IndexError),
        (torch.ones(()), 0, RuntimeError),
        (torch.ones(4, dtype=torch.int64), 0, NotImplementedError),
    ],
)
def test_bad_calls_raise_what_stock_raises(x, dim, error):
    for module in (functional, F):
        with pytest.raises(error):
            module.glu(x, dim)


def test_a_gate_and_a_value_must_fit():
    x = torch.ones(2, 3)
    for value in (torch.ones(3), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="one shape and dtype"):
            functional.swiglu(x, value)
    with pytest.raises(RuntimeError, match="approximate"):
        functional.geglu(x, x, approximate="erf")


def test_which_half_is_the_gate(backend):
    """The second, as in torch's glu; of swiglu the first."""
    a, b = torch.randn(2, 3, 5, device=DEVICE).unbind()
    gates_second, gates_first = torch.cat((b, a), -1), torch.cat((a, b), -1)
    for name, f in (("glu", torch.sigmoid), ("reglu", F.relu), ("geglu", F.gelu)):
        gate = getattr(functional, name)
        torch.testing.assert_close(gate(gates_second), f(a) * b)
        torch.testing.assert_close(gate(gates_first, gate_first=True), f(a) * b)
    torch.testing.assert_close(functional.swiglu(gates_first), F.silu(a) * b)
    torch.testing.assert_close(functional.swiglu(gates_second, gate_first=False), F.silu(a) * b)


def test_halves_are_saved_once(backend):
    """One tensor, x itself: no half of it is copied, nor f(a)."""
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
