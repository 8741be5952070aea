"""Every load, store and atomic operation of a Triton kernel in the interpreter.

They pass through a few methods of the interpreter's builder, where the addresses of the active
lanes are known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import numpy as np
from torch import Tensor

from ..backends import interpreting
from .interpreter import is_interpreted
from .interpreter.faster import remember_builtins


@dataclass(frozen=True)
class Access:
    """One instruction of one program.

    Attributes:
        kind: "load", "store" or "atomic".
        addresses: of the active lanes.
        size: bytes at each.
        program: where it is in the grid.
        values: of a store, the bytes for each address.
        locks: of an atomic operation, whether programs may wait for one another by it: it compares,
            swaps or counts.
    """

    kind: str
    addresses: np.ndarray
    size: int
    program: Any
    values: np.ndarray | None = None
    locks: bool = False


class Memory(Protocol):
    """What watches one launch."""

    def access(self, access: Access) -> np.ndarray:
        """Returns which of the addresses are allowed: the others are not accessed."""


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
    if not (interpreting() or is_interpreted()):
        raise RuntimeError(
            "memory accesses are seen in Triton's interpreter alone: set TRITON_INTERPRET=1 before "
            "the first import, or enter custom_backprop.testing.interpreted()"
        )
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

    remember_builtins()
    running: list[M] = []
    builder, call = interpreter_builder, GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas

    def watched_call(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        running.append(memory(tensors_in(given)))
        try:
            call(executor, *args, **kwargs)
        except BaseException:  # perhaps a configuration that autotuning tries in vain
            running.pop()
            raise
        name = f"{executor.fn.__module__.rpartition('.')[2]}.{executor.fn.__name__}"
        done(name, running.pop())

    def allowed(kind: str, pointers: Any, mask: Any, value: Any = None, locks: bool = False) -> Any:
        """The mask without the lanes that are not allowed."""
        active = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        values = None if value is None else np.broadcast_to(value.data, active.shape)[active]
        if values is not None:
            values = values.view(np.uint8).reshape(-1, values.itemsize)
        lanes = active.copy()
        lanes[active] = running[-1].access(
            Access(
                kind, pointers.data[active].astype(np.int64), size, builder.grid_idx, values, locks
            )
        )
        return TensorHandle(lanes, tl.int1)

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(pointers, allowed("load", pointers, mask), *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(pointers, value, allowed("store", pointers, mask, value), *rest)

    def watched_update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        locks = operation.name == "XCHG" or not value.dtype.scalar.is_floating()
        mask = allowed("atomic", pointers, mask, locks=locks)
        return update(operation, pointers, value, mask, *rest)

    def watched_swap(pointers: Any, compared: Any, *rest: Any) -> Any:
        every = TensorHandle(np.ones(pointers.data.shape, bool), tl.int1)
        if not allowed("atomic", pointers, every, locks=True).data.all():
            return compared
        return swap(pointers, compared, *rest)

    with ExitStack() as patches:
        for owner, name, replacement in (
            (GridExecutor, "__call__", watched_call),
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (builder, "create_atomic_rmw", watched_update),
            (builder, "create_atomic_cas", watched_swap),
        ):
            patches.enter_context(patch.object(owner, name, replacement))
        yield


def line_of_kernel() -> str:
    """The file and line that an access comes from: the innermost that is neither Triton's, NumPy's
    nor of this package."""
    import triton

    strangers = tuple(
        os.path.dirname(path) + os.sep for path in (triton.__file__, np.__file__, __file__)
    )
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(strangers):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


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
