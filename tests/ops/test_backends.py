"""The choice of a backend, and a machine without triton or without its interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, python

from custom_backprop import functional, get_backend, use_backend
from custom_backprop.backends import BACKENDS, library, selection, why_not
from custom_backprop.backends import kernels as kernels_module


def test_setting_and_context_manager():
    assert get_backend() is None
    try:
        use_backend("aten")
        assert get_backend() == "aten"
        with use_backend("formula") as outer:
            assert get_backend() == "formula"
            assert repr(outer) == "use_backend('formula')"
            with use_backend(None):
                assert get_backend() is None
            assert get_backend() == "formula"
        assert get_backend() == "aten"
    finally:
        use_backend(None)


def test_the_context_manager_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("formula"):
        raise KeyError
    assert get_backend() is None


@pytest.mark.parametrize("name", ["cuda", "", "ATEN"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="choose one of 'aten', 'formula', 'triton' or None"):
        use_backend(name)
    assert get_backend() is None


@pytest.mark.parametrize("forced", [*BACKENDS, None])
def test_the_forced_implementation_is_the_one_that_runs(forced, monkeypatch):
    if forced is not None and why_not(forced, DEVICE) is not None:
        pytest.skip(why_not(forced, DEVICE))
    called = []
    scratch = torch.library.Library(f"which_{forced}", "DEF")
    operator = library.primitive(
        "twice(Tensor x) -> Tensor",
        library=scratch,
        **{
            name: lambda x, name=name: called.append(name) or 2 * x
            for name in ("formula", "aten", "triton")
        },
    )
    with use_backend(forced):
        operator(torch.ones(3, device=DEVICE))
    assert called == [forced or ("triton" if DEVICE == "cuda" else "aten")]


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels run on a GPU here")
def test_kernels_refuse_tensors_of_another_device(monkeypatch):
    with use_backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(
            RuntimeError, match=r"'triton' cannot run on cpu tensors: .* set TRITON_INTERPRET=1"
        ):
            functional.relu(torch.ones(3))
    assert selection.why_not("triton", "cuda") is None


WITHOUT = """
import sys
import importlib.util, importlib.abc
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name == "triton" else find(name, package)
)
"""

LINEAR = """
import torch, custom_backprop
x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
custom_backprop.functional.linear(x, w).square().sum().backward()
print((w.grad - 2 * (x @ w.t()).t() @ x).abs().max().item() < 1e-5, "triton" in sys.modules)
try:
    custom_backprop.use_backend("triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton():
    assert python(WITHOUT + LINEAR).splitlines() == [
        "True False",
        "backend 'triton' cannot run here: the package triton is not installed",
    ]


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels run on a GPU here")
@pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason="triton is not installed")
def test_without_gpu_and_interpreter():
    assert "set TRITON_INTERPRET=1 before the first import" in python("import sys\n" + LINEAR)


@pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason="triton is not installed")
def test_triton_is_imported_when_a_kernel_is_wanted_and_not_before():
    code = """
import sys, torch, custom_backprop as c
c.functional.relu(torch.ones(2))
print('custom_backprop.triton_kernels' in sys.modules)"""
    assert python(code) == "False\n"


def test_the_kernels_of_another_checkout_are_not_taken_for_ours(tmp_path):
    """Which is what an editable install of that one offers."""
    other = tmp_path / "triton_kernels"
    other.mkdir()
    (other / "__init__.py").touch()
    own = Path(kernels_module.__file__).parents[2] / "triton_kernels" / "__init__.py"
    for file, ours in ((own, True), (other / "__init__.py", False)):
        assert (
            kernels_module._is_ours(
                importlib.util.spec_from_file_location(kernels_module.NAME, file)
            )
            is ours
        )
    assert not kernels_module._is_ours(None)


@pytest.mark.parametrize("first", ["import custom_backprop", "import torch.utils.flop_counter"])
def test_flops_are_counted_whoever_is_imported_first(first):
    code = f"""
{first}
import torch, custom_backprop
from torch.utils.flop_counter import FlopCounterMode
x, layer = torch.ones(2, 3, requires_grad=True), custom_backprop.nn.Linear(3, 4)
with FlopCounterMode(display=False) as counter:
    layer(x).sum().backward()
print(counter.get_total_flops())"""
    assert python(code) == f"{3 * 2 * 2 * 3 * 4}\n"


def test_triton_is_imported_only_for_kernels():
    assert python("import sys, custom_backprop; print('triton' in sys.modules)") == "False\n"
