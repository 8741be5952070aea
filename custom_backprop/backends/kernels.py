"""Finds the folder of Triton kernels: inside the package when installed, beside it in a bare
checkout.

Either way its name is ``custom_backprop.triton_kernels``: a package of the environment that is
called ``triton_kernels`` is never met.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NAME = "custom_backprop.triton_kernels"


@cache
def kernels(family: str) -> ModuleType:
    """The module of one family's kernels and launchers, imported at the first call (this is what
    imports triton)."""
    if NAME not in sys.modules and not _is_ours(importlib.util.find_spec(NAME)):
        _load_from_checkout()
    return importlib.import_module(f"{NAME}.{family}")


def _is_ours(spec: ModuleSpec | None) -> bool:
    """Whether what would be imported lies in this package, or beside it. An editable install of
    another checkout offers its own."""
    package = Path(__file__).resolve().parents[1]
    return (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin).resolve().parents[1] in (package, package.parent)
    )


def _load_from_checkout() -> None:
    folder = Path(__file__).resolve().parents[2] / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise ModuleNotFoundError(
            f"no Triton kernels: neither {NAME} nor {folder} exists", name=NAME
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
