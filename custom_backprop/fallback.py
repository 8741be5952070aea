"""The names that a package of ours leaves to the package of torch whose place it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def fall_back(ours: str, stock: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of the module called ``ours``: a name that it does not have
    is ``stock``'s, looked up at each use."""

    def __getattr__(name: str) -> Any:
        # a module's own facts, such as __path__ and __wrapped__, are nobody else's
        if not name.startswith("__") and hasattr(stock, name):
            return getattr(stock, name)
        raise AttributeError(
            f"module {ours!r} has no attribute {name!r}, and neither has {stock.__name__!r}"
        )

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[ours]), *(n for n in dir(stock) if n[0] != "_")})

    return __getattr__, __dir__
