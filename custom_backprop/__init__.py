"""Backpropagation written out: layers whose backward is an explicit formula, run by Triton kernels,
proved against autograd."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import functional, init, monitor, nn, optim, testing
from .backends import get_backend, use_backend
from .convert import convert, register_conversion, revert
from .patch import patch
from .report import conversion_report

if _TYPE_CHECKING:
    from . import cost as cost
    from . import distributed as distributed
    from . import extend as extend

__version__ = "0.2.0"

__all__ = [
    "conversion_report",
    "convert",
    "functional",
    "get_backend",
    "init",
    "monitor",
    "nn",
    "optim",
    "patch",
    "register_conversion",
    "revert",
    "testing",
    "use_backend",
]

#: imported when they are first asked for: torch.distributed.tensor takes longer than all else here
_LATER = ("cost", "distributed", "extend")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
