"""What a user calls a function and its arguments, for a script that calls it again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any


def importable(function: Callable[..., Any] | None, name: str, title: str) -> tuple[str, str]:
    """(the expression that is the function, the line that imports it). Where no import gives it, a
    line that leaves it to the reader."""
    owner = getattr(function, "__self__", None)
    if inspect.isclass(owner):  # MyFunction.apply
        path = f"{owner.__qualname__}.{getattr(function, '__name__', '')}"
        module = owner.__module__
    else:
        path = getattr(function, "__qualname__", "")
        module = getattr(function, "__module__", None) or ""
        module = "torch" if module.startswith("torch._") else module
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        return name, f"{name} = ...  # {title}"
    if found != function or (module == "__main__" and not hasattr(sys.modules[module], "__file__")):
        return name, f"{name} = ...  # {title}"
    return path, f"from {module} import {path.split('.')[0]}"


def parameter_names(function: Callable[..., Any], count: int) -> list[str]:
    """The names of the first ``count`` positional parameters."""
    owner = getattr(function, "__self__", None)
    called = getattr(owner, "forward", function) if inspect.isclass(owner) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "ctx"
    ]
    return (names + [f"x{i}" for i in range(len(names), count)])[:count]
