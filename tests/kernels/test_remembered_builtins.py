"""Triton's interpreter, made faster."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import DEVICE

from custom_backprop import functional, use_backend
from custom_backprop.backends import interpreting, why_not
from custom_backprop.testing.interpreter.faster import remember_builtins


@pytest.mark.skipif(
    not interpreting() or why_not("triton", DEVICE) is not None, reason="no interpreter"
)
def test_no_call_of_a_kernel_looks_for_builtins_again(monkeypatch):
    remember_builtins()
    x = torch.rand(2, 3)
    with use_backend("triton"):
        functional.softmax(x, 1)
        monkeypatch.setattr(inspect, "getmembers", lambda *_: pytest.fail("looked again"))
        torch.testing.assert_close(functional.softmax(x, 1), torch.softmax(x, 1))
