"""Every load and store of a Triton kernel in the interpreter.

They pass through two methods of the interpreter's builder, where the addresses of the active lanes
are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import numpy as np
from torch import Tensor

from ..backends import interpreting


class Memory(Protocol):
    """What watches one launch."""

    atomics: int

    def access(self, addresses: np.ndarray, size: int, program: Any, stores: bool) -> np.ndarray:
        """Gets an access to ``size`` bytes at each address. Returns which of them are allowed: the
        others are not executed."""


M = TypeVar("M", bound=Memory)


@contextmanager
def watched(
    memory: Callable[[dict[str, Tensor]], M], done: Callable[[str, M], None]
) -> Iterator[None]:
    """Watches every launch of any Triton kernel inside.

    Args:
        memory: makes the watcher of a launch from its tensor arguments.
        done: gets the kernel's name and its watcher after the launch.

    Raises:
        RuntimeError: the interpreter is off.
    """
    if not interpreting():
        raise RuntimeError(
            "memory accesses are seen in Triton's interpreter alone: set TRITON_INTERPRET=1 before "
            "the first import"
        )
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

    running: list[M] = []
    builder, call = interpreter_builder, GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_call(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        running.append(memory(tensors_in(given)))
        try:
            call(executor, *args, **kwargs)
        finally:
            name = f"{executor.fn.__module__.rpartition('.')[2]}.{executor.fn.__name__}"
            done(name, running.pop())

    def allowed(pointers: Any, mask: Any, stores: bool) -> Any:
        """The mask without the lanes that are not allowed."""
        active = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = active.copy()
        lanes[active] = running[-1].access(
            pointers.data[active].astype(np.int64), size, builder.grid_idx, stores
        )
        return TensorHandle(lanes, tl.int1)

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(pointers, allowed(pointers, mask, stores=False), *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(pointers, value, allowed(pointers, mask, stores=True), *rest)

    def counted(atomic: Callable[..., Any]) -> Callable[..., Any]:
        def watched_atomic(*args: Any) -> Any:
            running[-1].atomics += 1
            return atomic(*args)

        return watched_atomic

    with ExitStack() as patches:
        for owner, name, replacement in (
            (GridExecutor, "__call__", watched_call),
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (builder, "create_atomic_rmw", counted(builder.create_atomic_rmw)),
            (builder, "create_atomic_cas", counted(builder.create_atomic_cas)),
        ):
            patches.enter_context(patch.object(owner, name, replacement))
        yield


def tensors_in(named: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a kernel's arguments, with those in tuples and the one of a tensor
    descriptor."""
    found: dict[str, Tensor] = {}
    for name, a in named.items():
        if isinstance(a, Tensor):
            found[name] = a
        elif isinstance(a, tuple):
            found |= tensors_in({f"{name}[{i}]": item for i, item in enumerate(a)})
        elif isinstance(getattr(a, "base", None), Tensor):
            found[name] = a.base
    return found
