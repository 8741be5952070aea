"""Blocks and pieces so small that the tensors of these tests need several."""

from __future__ import annotations

import pytest
from optim_helpers import HAS_KERNELS

from custom_backprop.backends.kernels import kernels
from custom_backprop.optim import pieces


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_KERNELS:
        monkeypatch.setattr(kernels("optim"), "BLOCK", 32)
        monkeypatch.setattr(kernels("optim"), "ROUNDS", 2)
    monkeypatch.setattr(pieces, "PIECE", 64)  # a multiple of a vector, as the real size
