"""The one way a kernel is launched: device guard, empty work returns early, and a cache of compiled
kernels with a cheap key.

A kernel takes its runtime arguments first, tensors before numbers, and its ``tl.constexpr``
parameters last. ``kernel[grid](...)`` binds and specialises at every call. Here the compiled kernel
is kept under a key of our own, and a launch that finds it goes straight to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
import triton
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_HIP = torch.version.hip is not None

_bound: dict[Any, Callable[..., None]] = {}
_observers: list[Callable[..., None]] = []


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constexprs: Any,
) -> None:
    """Runs ``kernel`` on a grid of ``programs`` programs (all on axis x, whose limit is 2**31 - 1).

    Args:
        args: the runtime arguments in the order of the kernel's signature: tensors, or None for an
            absent one, then numbers.
        constexprs: the kernel's constexpr parameters, in the order of its signature.

    Raises:
        RuntimeError: the tensors are not all on one device.
        TypeError: a constexpr is missing, or they are not in order.
    """
    if programs == 0:
        return
    variant = _variant(kernel, num_warps, num_stages, constexprs)
    bound = _bound.get(variant)
    if bound is None:
        tensors = next((i for i, a in enumerate(args) if isinstance(a, (int, float))), len(args))
        bound = _bound[variant] = bind(
            kernel,
            tensors,
            len(args) - tensors,
            num_warps=num_warps,
            num_stages=num_stages,
            **constexprs,
        )
    bound(programs, *args)


def bind(
    kernel: Any,
    tensors: int,
    numbers: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **constexprs: Any,
) -> Callable[..., None]:
    """``launch`` for one choice of the constexprs, as a function ``bound(programs, *args)``: half
    the cost of a call, if it is kept.

    Args:
        tensors, numbers: how many of the runtime arguments are tensors (or None), and how many
            numbers.

    Raises:
        TypeError: a constexpr is missing, or they are not in order.
    """
    names = kernel.arg_names[tensors + numbers :]
    if names != list(constexprs):
        raise TypeError(
            f"{kernel.__name__} takes the constexprs {names}, all of them and in this order, but was given {list(constexprs)}"
        )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled: dict[tuple[Any, ...], Any] | None = {} if isinstance(kernel, JITFunction) else None

    def by_triton(programs: int, *args: Any) -> None:
        """Every launch but those of a kernel that is compiled, on the current device, when nobody
        looks."""
        if programs == 0:
            return
        device = _device(kernel, args)
        given = args
        if compiled is None and device.type != "meta":
            args = _in_float32(args)
        for observer in _observers[-1:]:
            observer(kernel, programs, args, constexprs, options)
        if device.type == "meta":
            return
        if compiled is None:
            _take_arrays_of_one_element_as_integers()
            with np.errstate(
                all="ignore"
            ):  # a GPU says nothing of an overflow, nor of what masked lanes compute
                kernel[(programs,)](*args, **constexprs, **options)
            _round_back(given, args)
            return
        with torch.cuda.device(device):
            hooked = (
                knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
            )  # which see every launch
            if (key := key_of(*args)) in compiled and not _observers and not hooked:
                bound(programs, *args)
                return
            binary = kernel[(programs,)](*args, **constexprs, **options)
        compiled[key] = device.index, binary.run, binary.function, binary.packed_metadata

    if compiled is None:
        return by_triton
    key_of, bound = _written_out(tensors, numbers, compiled, by_triton, tuple(constexprs.values()))
    return bound


def kept(make: Callable[..., Callable[..., None]]) -> Callable[..., Callable[..., None]]:
    """Decorator of a function that binds: what it made for these arguments, strings and numbers, is
    made once."""
    made: dict[tuple[Any, ...], Callable[..., None]] = {}

    @wraps(make)
    def get(*args: Any) -> Callable[..., None]:
        key = (
            args if all(args) else tuple([a or repr(a) for a in args])
        )  # 0.0 and -0.0 are equal, and not the same
        found = made.get(key)
        if found is None:
            found = made[key] = make(*args)
        return found

    return get


def _variant(
    kernel: Any, num_warps: int, num_stages: int, constexprs: dict[str, Any]
) -> tuple[Any, ...]:
    """What a launcher is kept under. Functions stand for themselves by ``id`` (what is compiled of
    them keeps them alive): Triton hashes them by their source, at every call."""
    return (
        id(kernel),
        num_warps,
        num_stages,
        *[id(c) if type(c) is JITFunction else c or repr(c) for c in constexprs.values()],
    )


def _written_out(
    tensors: int,
    numbers: int,
    compiled: dict[tuple[Any, ...], Any],
    by_triton: Callable[..., None],
    constexprs: tuple[Any, ...],
) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., None]]:
    """The key of some arguments, and a launch of them, argument by argument: a loop over them would
    take twice as long.

    The key holds all that a compiled kernel depends on: device, dtype and 16-byte alignment of a
    pointer; an integer's width and
    divisibility by 16. Tensors of two devices give a key that no kernel has. The driver is given
    addresses: of a tensor it would ask for its address again, and then the GPU whether that is one
    of its own.
    """
    names = [f"a{i}" for i in range(tensors + numbers)]
    addresses = [f"p{i}" for i in range(tensors)]
    reach = (
        ", {0}.untyped_storage().nbytes() < 2147483648" if _HIP else ""
    )  # AMD's buffer instructions reach 2 GiB
    tensor = (
        "{0} if {0} is None else ({0}.get_device(), {0}.dtype, not ({1} := {0}.data_ptr()) & 15"
        + reach
        + ")"
    )
    number = "({0} == 1 or ({0} & 15 == 0, -2147483648 <= {0} < 2147483648)) if type({0}) is int else type({0})"
    parts = [tensor.format(*pair) for pair in zip(names[:tensors], addresses, strict=True)] + [
        number.format(a) for a in names[tensors:]
    ]
    key = "".join(f"{part}, " for part in parts)
    args, passed = ", ".join(names), ", ".join(addresses + names[tensors:])
    source = f"""
def key_of({args}):
    return ({key})

def bound(programs, {args}):
    {" = ".join([*addresses, "None"])}
    ready = get(({key}))
    if (
        ready is None or ready[0] != device() or observers or programs == 0
        or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    ):
        by_triton(programs, {args})
    else:
        ready[1](programs, 1, 1, stream(ready[0]), ready[2], ready[3], None, None, None, {passed}, *constexprs)
"""
    space: dict[str, Any] = {
        "get": compiled.get, "observers": _observers, "runtime": knobs.runtime, "by_triton": by_triton, "constexprs": constexprs,
        "device": getattr(torch._C, "_cuda_getDevice", None), "stream": getattr(torch._C, "_cuda_getCurrentRawStream", None),
    }  # fmt: skip
    exec(source, space)
    return space["key_of"], space["bound"]


@cache
def _take_arrays_of_one_element_as_integers() -> None:
    """Lets the interpreter loop to a bound that is no constant: before triton 3.7 numpy 2.4 forbids
    what it does (triton issue 9171)."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        interpreter._patch_lang_tensor = patched


def _in_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """bfloat16 tensors in float32, storage and strides alike.

    Triton's interpreter holds bfloat16 as bit patterns (triton issues 4972 and 11584): it truncates
    where a GPU rounds to nearest, and maximum and dot see integers. A kernel that computes in
    float32 and rounds at its stores, as ours do, gives the GPU's numbers this way.
    """
    return tuple(
        _storage(a).float().as_strided(a.size(), a.stride(), a.storage_offset())
        if _is_bfloat16(a)
        else a
        for a in args
    )


def _round_back(given: tuple[Any, ...], computed: tuple[Any, ...]) -> None:
    for a, b in zip(given, computed, strict=True):
        if _is_bfloat16(a):
            before, after = _storage(a), _storage(b)
            if not torch.equal(before.float().view(torch.int32), after.view(torch.int32)):
                before.copy_(after)


def _storage(t: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage, as a flat tensor."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def _is_bfloat16(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16


def _device(kernel: Any, args: tuple[Any, ...]) -> torch.device:
    device = None
    for a in args:
        if isinstance(a, torch.Tensor):
            if device is None:
                device = a.device
            elif a.device != device:
                raise RuntimeError(
                    f"Expected all tensors of {kernel.__name__} to be on the same device, but found {device} and {a.device}"
                )
    if device is None:
        raise RuntimeError(f"{kernel.__name__} was launched without a tensor")
    return device


@contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Calls ``observer(kernel, programs, args, constexprs, options)`` before each launch. On meta
    tensors nothing else happens."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; on other devices a number that lets every path of a
    kernel be met at small sizes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of ``dtype`` are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """Programs of ``b`` elements that ``a`` elements take. (triton.cdiv, called on the host, costs
    as much as a launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
