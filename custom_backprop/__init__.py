"""Backpropagation written out: layers whose backward is an explicit formula, run by Triton kernels,
proved against autograd.

Everything is imported when it is first asked for, so that ``custom-backprop --help`` and pytest,
where this package is installed beside others, need not wait for torch. An exported program that
calls our operators is loaded after ``import custom_backprop.functional``, which registers them.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from . import cost as cost
    from . import distributed as distributed
    from . import extend as extend
    from . import functional, init, monitor, nn, optim, testing
    from .backends import get_backend, use_backend
    from .conversions.convert import convert, register_conversion, revert
    from .conversions.patch import patch
    from .conversions.report import conversion_report

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

#: name -> the module that defines it
_FUNCTIONS = {
    "conversion_report": "conversions.report",
    "convert": "conversions.convert",
    "get_backend": "backends",
    "patch": "conversions.patch",
    "register_conversion": "conversions.convert",
    "revert": "conversions.convert",
    "use_backend": "backends",
}
_MODULES = {*__all__, "cost", "distributed", "extend"} - {*_FUNCTIONS}


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _import_module(f".{name}", __name__)
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_import_module(f".{_FUNCTIONS[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_FUNCTIONS})
