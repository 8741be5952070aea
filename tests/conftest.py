"""A test that takes ``backend`` runs on every backend that the machine has: without a GPU, the
kernels run in the interpreter."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when a kernel is decorated: before custom_backprop is imported
    )

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core: more threads would only get in each other's way

from helpers import DEVICE

import custom_backprop
from custom_backprop.backends import BACKENDS, interpreting, why_not
from custom_backprop.backends.kernels import kernels
from custom_backprop.testing.interpreter.faster import remember_builtins

if interpreting() and why_not("triton", DEVICE) is None:
    remember_builtins()

EXAMPLES = Path(__file__).parents[1] / "examples"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first: a matrix product in the interpreter, begun last, would leave the other
    processes without work."""
    items.sort(key=lambda item: "triton-linear" not in item.name)


@pytest.fixture(params=[b for b in BACKENDS if why_not(b, DEVICE) is None])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend, forced while the test runs."""
    with custom_backprop.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets CUSTOM_BACKPROP_NO_CLUSTERS, which is read once."""
    launch = kernels("launch")

    def switch(value: str) -> None:
        monkeypatch.setenv("CUSTOM_BACKPROP_NO_CLUSTERS", value)
        launch.has_clusters.cache_clear()

    yield switch
    launch.has_clusters.cache_clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], tuple[Any, Callable[..., None]]]]:
    """Imports an example, and runs its main() in this process with the options given; results under
    tmp_path unless they say."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()

    def load(name: str) -> tuple[Any, Callable[..., None]]:
        module = importlib.import_module(name)

        def main(*options: Any) -> None:
            monkeypatch.setattr(
                sys, "argv", [name, "--out", str(tmp_path), "--device", "cpu", *map(str, options)]
            )
            module.main()

        return module, main

    with custom_backprop.use_backend(None):
        yield load
    torch.set_num_threads(threads)
    for file in EXAMPLES.glob("*.py"):
        sys.modules.pop(file.stem, None)
