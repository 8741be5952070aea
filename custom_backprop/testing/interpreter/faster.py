"""Makes Triton's interpreter faster, and changes nothing else."""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def remember_builtins() -> None:
    """Each call of a ``@triton.jit`` function by another one looks through all members of
    ``triton.language`` for those that it has to replace: a third of the time of our kernels. From
    now on they are looked for once. Not to be called while a kernel runs, when they are replaced
    already."""
    from triton.runtime import interpreter

    parameters = inspect.signature(interpreter._patch_builtin).parameters
    if list(parameters) != ["pkg", "builder", "scope"]:  # another version of triton
        return
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(pkg: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        for name in names(pkg):
            member = getattr(pkg, name)
            if is_builtin(member):
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
