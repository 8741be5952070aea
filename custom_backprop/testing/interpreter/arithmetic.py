"""Numbers as a GPU computes them, where Triton's interpreter does otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from .libdevice import call_symbol


def float32_of(bits: np.ndarray) -> np.ndarray:
    """The numbers of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_of(numbers: np.ndarray) -> np.ndarray:
    """The bit patterns of the nearest bfloat16 numbers; of two as near, the even one."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).reshape(np.shape(numbers))
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nearest = np.where(np.isnan(numbers), bits | np.uint32(0x400000), nearest)
    return (nearest >> np.uint32(16)).astype(np.uint16)


@contextmanager
def patched() -> Iterator[None]:
    """bfloat16, float arguments, and libdevice's functions; no warnings of overflow."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import (
        GridExecutor,
        InterpreterBuilder,
        ReduceOps,
        ScanOps,
        TensorHandle,
    )

    def is_bfloat16(handle: Any) -> bool:
        return handle is not None and handle.dtype.scalar == tl.bfloat16

    def wide(handle: Any) -> Any:
        if not is_bfloat16(handle):
            return handle
        return TensorHandle(float32_of(handle.data), tl.float32)

    def narrow(handle: Any) -> Any:
        """Rounded to bfloat16; the result of a comparison as it is."""
        data = handle.data
        return TensorHandle(data if data.dtype == bool else bfloat16_of(data), tl.bfloat16)

    def in_float32(operation: Any) -> Any:
        """An operation of the builder on handles, the last argument being NumPy's function."""

        def computed(builder: Any, *args: Any) -> Any:
            *handles, function = args
            if function is np.where or not any(map(is_bfloat16, handles)):
                return operation(builder, *args)
            return narrow(operation(builder, *map(wide, handles), function))

        return computed

    def of_handles(operation: Any, rounds: bool = True) -> Any:
        """An operation of the builder whose leading arguments are handles."""

        def computed(builder: Any, *args: Any) -> Any:
            handles = [isinstance(a, TensorHandle) and is_bfloat16(a) for a in args]
            if not any(handles):
                return operation(builder, *args)
            wider = (wide(a) if bf16 else a for a, bf16 in zip(args, handles, strict=True))
            found = operation(builder, *wider)
            return narrow(found) if rounds else found

        return computed

    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(builder: Any, source: Any, target: Any) -> Any:
        source = wide(source)
        if target.scalar != tl.bfloat16:
            return source if source.dtype == target.scalar else cast(builder, source, target)
        return TensorHandle(bfloat16_of(source.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(builder: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = interpreter._ir.ROUNDING_MODE.RTNE
        if (is_bfloat16(source) or target.scalar == tl.bfloat16) and rounding in (None, nearest):
            return cast_impl(builder, source, target)
        return convert(builder, source, target, rounding)

    def reduced(apply: Any) -> Any:
        """A reduction or scan: rounded once, at its end."""

        def wider(t: Any) -> Any:
            return tl.core.tensor(wide(t.handle), _with_element(tl, t.type, tl.float32))

        def narrower(t: Any, like: Any) -> Any:
            if like.dtype != tl.bfloat16 or t.dtype != tl.float32:
                return t
            return tl.core.tensor(narrow(t.handle), _with_element(tl, t.type, tl.bfloat16))

        def computed(self: Any, given: Any) -> Any:
            if not any(t.dtype == tl.bfloat16 for t in given):
                return apply(self, given)
            found = apply(self, tuple(map(wider, given)))
            if not isinstance(found, (tuple, list)):
                return narrower(found, given[0])
            given = [*given, *[given[-1]] * (len(found) - len(given))]
            return tuple(map(narrower, found, given))

        return computed

    def no_atomic(builder: Any, operation: Any, pointer: Any, *rest: Any) -> Any:
        if pointer.get_element_ty() == tl.bfloat16:
            raise NotImplementedError("atomic operations on bfloat16 are not interpreted")
        return atomic(builder, operation, pointer, *rest)

    implicit, atomic = interpreter._implicit_cvt, InterpreterBuilder.create_atomic_rmw

    def implicit_cvt(argument: Any) -> Any:
        """An argument of a launch: a compiled kernel gets a float in float32."""
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return implicit(argument)

    def extern(builder: Any, library: str, path: str, symbol: str, args: Any, kind: Any, pure: bool
    ) -> Any:  # fmt: skip
        result = np.asarray(call_symbol(symbol, *(a.data for a in args)))
        dtype = kind.scalar if hasattr(kind, "scalar") else kind
        return TensorHandle(result.astype(interpreter._get_np_dtype(dtype)), dtype)

    run = GridExecutor.__call__

    def quiet(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A GPU reports no overflow, nor what masked lanes compute."""
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return run(executor, *args, **kwargs)

    builder = InterpreterBuilder
    replaced = [
        (builder, name, in_float32(getattr(builder, name)))
        for name in ("unary_op", "binary_op", "ternary_op")
    ]
    replaced += [
        (builder, name, of_handles(getattr(builder, name)))
        for name in ("create_erf", "create_fma", "create_rsqrt")
    ]
    replaced += [
        (builder, "create_dot", of_handles(builder.create_dot, rounds=False)),
        (builder, "cast_impl", cast_impl),
        (builder, "create_fp_to_fp", create_fp_to_fp),
        (builder, "create_atomic_rmw", no_atomic),
        (builder, "create_extern_elementwise", extern),
        (ReduceOps, "apply_impl", reduced(ReduceOps.apply_impl)),
        (ScanOps, "apply_impl", reduced(ScanOps.apply_impl)),
        (interpreter, "_implicit_cvt", implicit_cvt),
        (GridExecutor, "__call__", quiet),
    ]
    with ExitStack() as patches:
        for owner, name, replacement in replaced:
            patches.enter_context(patch.object(owner, name, replacement))
        yield


def _with_element(tl: Any, kind: Any, element: Any) -> Any:
    return tl.block_type(element, list(kind.shape)) if kind.is_block() else element
