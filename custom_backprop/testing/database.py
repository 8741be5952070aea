"""The op database: every spec of every family, by name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from . import specs
from .spec import OpSpec


@cache
def database() -> dict[str, OpSpec]:
    """name -> spec. A family's file in ``specs/`` is found by being there."""
    found: dict[str, OpSpec] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(specs.__path__)):
        for spec in importlib.import_module(f"{specs.__name__}.{module}").SPECS:
            if spec.name in found:
                raise RuntimeError(f"two specs are named {spec.name!r}")
            found[spec.name] = spec
    return found
