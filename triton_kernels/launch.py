"""The one way a kernel is launched: device guard, empty work returns early, and a cache of compiled kernels with a cheap key.

A kernel takes its runtime arguments first and its ``tl.constexpr`` parameters last. ``kernel[grid](...)`` binds and specialises at every
call; here the compiled kernel is kept under a key of our own, and a launch that hits it goes straight to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_HIP = torch.version.hip is not None

_compiled: dict[Any, Any] = {}
_observer: Callable[..., None] | None = None


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any) -> None:
    """Runs ``kernel`` on a grid of ``programs`` programs (all on axis x, whose limit is 2**31 - 1).

    Args:
        args: the runtime arguments in the order of the kernel's signature: tensors, numbers, or None for an absent tensor.
        constexprs: the kernel's constexpr parameters, in the order of its signature.

    Raises:
        RuntimeError: the tensors are not all on one device.
        TypeError: a constexpr is missing, or they are not in order.
    """
    if programs == 0:
        return
    compiled = isinstance(kernel, JITFunction)
    if compiled and _observer is None:
        key = _key(kernel, num_warps, num_stages, args, constexprs)
        known = _compiled.get(key)
        if known is not None and not knobs.runtime.launch_enter_hook.calls and not knobs.runtime.launch_exit_hook.calls:
            index, run, function, metadata = known
            if index != torch._C._cuda_getDevice():
                with torch.cuda.device(index):
                    launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages, **constexprs)
                return
            stream = torch._C._cuda_getCurrentRawStream(index)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *constexprs.values())
            return
    device = _device(kernel, args)
    given = args
    if not compiled and device.type != "meta":
        args = _in_float32(args)
    if _observer is not None:
        _observer(kernel, programs, args, constexprs, {"num_warps": num_warps, "num_stages": num_stages})
    if device.type == "meta":
        return
    _check_order(kernel, args, constexprs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if compiled:
        with torch.cuda.device(device):
            binary = kernel[(programs,)](*args, **constexprs, **options)
        ready = device.index, binary.run, binary.function, binary.packed_metadata
        _compiled[_key(kernel, num_warps, num_stages, args, constexprs)] = ready
    else:
        _take_arrays_of_one_element_as_integers()
        with np.errstate(all="ignore"):  # a GPU says nothing of an overflow, nor of what masked lanes compute
            kernel[(programs,)](*args, **constexprs, **options)
        _round_back(given, args)


def _key(kernel: Any, num_warps: int, num_stages: int, args: tuple[Any, ...], constexprs: dict[str, Any]) -> tuple[Any, ...]:
    """All that a compiled kernel depends on: device, dtype and 16-byte alignment of a pointer; an integer's width and divisibility by 16.

    Tensors of two devices give a key that no kernel has. Functions stand for themselves by ``id`` (a compiled kernel keeps them alive):
    Triton hashes them by their source, at every call.
    """
    key: list[Any] = [id(kernel), num_warps, num_stages]
    add = key.append
    for a in args:
        kind = type(a)
        if kind is int:
            add(1 if a == 1 else (a % 16 == 0, -(2**31) <= a < 2**31))
        elif a is None or kind is float or kind is bool:
            add(kind)
        else:
            key += a.get_device(), a.dtype, not a.data_ptr() & 15
            if _HIP:  # AMD's buffer instructions reach 2 GiB
                add(a.untyped_storage().nbytes() < 2**31)
    for c in constexprs.values():
        add(id(c) if type(c) is JITFunction else c or repr(c))  # 0.0, -0.0 and False are equal, and not the same
    return tuple(key)


def _check_order(kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any]) -> None:
    """A launch from the cache passes every argument by position."""
    names = kernel.arg_names[len(args) :]
    if names != list(constexprs):
        raise TypeError(f"{kernel.__name__} takes the constexprs {names}, all of them and in this order, but was given {list(constexprs)}")


@cache
def _take_arrays_of_one_element_as_integers() -> None:
    """Lets the interpreter loop to a bound that is no constant: before triton 3.7 numpy 2.4 forbids what it does (triton issue 9171)."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        interpreter._patch_lang_tensor = patched


def _in_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """bfloat16 tensors in float32, storage and strides alike.

    Triton's interpreter holds bfloat16 as bit patterns (triton issues 4972 and 11584): it truncates where a GPU rounds to nearest, and
    maximum and dot see integers. A kernel that computes in float32 and rounds at its stores, as ours do, gives the GPU's numbers this way.
    """
    return tuple(_storage(a).float().as_strided(a.size(), a.stride(), a.storage_offset()) if _is_bfloat16(a) else a for a in args)


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
                raise RuntimeError(f"Expected all tensors of {kernel.__name__} to be on the same device, but found {device} and {a.device}")
    if device is None:
        raise RuntimeError(f"{kernel.__name__} was launched without a tensor")
    return device


@contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Calls ``observer(kernel, programs, args, constexprs, options)`` before each launch. On meta tensors nothing else happens."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; on other devices a number that lets every path of a kernel be met at small sizes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of ``dtype`` are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """Programs of ``b`` elements that ``a`` elements take. (triton.cdiv, called on the host, costs as much as a launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
