"""The launches that any code makes, seen in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .interpreter import interpreted
from .interpreter.kernels import observers
from .offline import Launch


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Runs every Triton kernel inside in the interpreter, as :func:`interpreted` does, and yields
    the list of its launches. They hold no tensor: of each its dtype and its alignment.

    Example::

        with record_launches() as launches:
            my_function(x).sum().backward()
        for resources in compile_launches(launches, "sm_90"):
            print(resources.kernel, resources.registers, resources.spilled)
    """
    found: list[Launch] = []

    def observe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_launch(kernel, args, kwargs))

    with interpreted():
        observers.append(observe)
        try:
            yield found
        finally:
            observers.remove(observe)


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    named = dict(zip(kernel.arg_names, args, strict=False))
    named |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    constexprs = {p.name for p in getattr(kernel, "params", ()) if p.is_constexpr}
    return Launch(
        kernel,
        (),
        {name: value for name, value in named.items() if name in constexprs},
        options,
        {name: _without_data(value) for name, value in named.items() if name not in constexprs},
    )


def _without_data(value: Any) -> Any:
    """A tensor's dtype and alignment, which are what Triton compiles for."""
    from triton.runtime.jit import MockTensor

    if isinstance(value, tuple):
        return tuple(map(_without_data, value))
    if not isinstance(value, Tensor):
        return value
    pointer = MockTensor(value.dtype, tuple(value.shape))
    offset = value.data_ptr() % 16
    pointer.data_ptr = lambda: offset
    return pointer
