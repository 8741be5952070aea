"""A test that takes ``backend`` runs on every backend that the machine has: without a GPU, the kernels run in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before custom_backprop is imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core: more threads would only get in each other's way

import custom_backprop
from custom_backprop.backends import BACKENDS, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[b for b in BACKENDS if why_not(b, DEVICE) is None])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend, forced while the test runs."""
    with custom_backprop.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
