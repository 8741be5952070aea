"""The kernels of other packages: each file has those of one, by the name of our op and with its
signature.

The ops of ``benchmarks.peers`` cannot serve: they are programs for a reader, each with inputs of
its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        name: on the package index.
        version: the installed one; empty if none is.
        ops: name -> function.
        reason: why there are none.
    """

    name: str
    version: str = ""
    ops: dict[str, Callable[..., Any]] = field(default_factory=dict)
    reason: str = ""


def peers() -> list[Peer]:
    """All, installed or not."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [_peer(importlib.import_module(f"{__name__}.{name}")) for name in modules]


def _peer(module: Any) -> Peer:
    name: str = module.PACKAGE
    try:
        found = version(name)
    except PackageNotFoundError:
        return Peer(name, reason="not installed")
    try:
        return Peer(name, found, module.ops())
    except Exception as error:  # such as a library that the package was not built for
        return Peer(name, found, reason=f"cannot be imported: {type(error).__name__}: {error}")
