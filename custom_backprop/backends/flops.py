"""Flops of primitives, for ``torch.utils.flop_counter``, and so for Lightning's summary and others.

That module imports triton, which this package imports only when a kernel is first wanted. So the
formulas are registered as soon as somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"

#: operator -> its flops, from the shapes of its arguments
_formulas: dict[Any, Callable[..., int]] = {}


def count(operator: Any, flops: Callable[..., int]) -> None:
    """Registers the flops of an operator, now or when PyTorch's counter is imported."""
    _formulas[operator.overloadpacket] = flops
    if (counter := sys.modules.get(_COUNTER)) is not None:
        _register(counter)


def _register(counter: ModuleType) -> None:
    for packet in [p for p in _formulas if p not in counter.flop_registry]:
        # PyTorch passes shapes for tensors, and results by keyword
        formula = _formulas[packet]
        counter.register_flop_formula(packet)(lambda *args, f=formula, **_: f(*args))


class _WhenImported(MetaPathFinder):
    """Finds the counter as everybody else does, and registers what it is to count."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
