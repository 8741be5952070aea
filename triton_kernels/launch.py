"""The one way a kernel is launched.

A :class:`Kernel` takes tensors (named in capitals), then numbers, then ``tl.constexpr`` parameters.
A family has one function ``plan(shape, strides, dtype, ...) -> Launch``, cached by :func:`planned`;
what it returns is called with the tensors alone.

``kernel[grid](...)`` binds and specialises at every call. Here the compiled kernel is found under a
cheap key of our own, and a launch that finds it goes straight to the driver.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from types import CodeType, FunctionType
from typing import Any, Protocol

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

#: plans of a family: shapes that do not come back are forgotten
PLANS = 4096

_HIP = torch.version.hip is not None
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

_observers: list[Callable[..., None]] = []
_meta_capabilities = [0]


class Launch(Protocol):
    """A kernel with its programs, its numbers and its constants: call it with the tensors, and by
    name with the numbers that it was made without."""

    programs: int
    numbers: dict[str, Any]

    def __call__(self, *tensors: Tensor | None, **named: Any) -> None: ...


#: what a compiled kernel depends on: of a number, whether it is 1, is divisible by 16 and fits into
#: 32 bits; of a pointer, its device, dtype and 16-byte alignment
NUMBER = (
    "({0} == 1 or ({0} & 15 == 0, -2147483648 <= {0} < 2147483648))"
    " if type({0}) is int else type({0})"
)
TENSOR = (
    "{0} if {0} is None else ({0}.get_device(), {0}.dtype, not (_{0} := {0}.data_ptr()) & 15"
    # AMD's buffer instructions reach 2 GiB
    + (", {0}.untyped_storage().nbytes() < 2147483648)" if _HIP else ")")
)

_kind: Callable[[Any], Any] = eval(f"lambda n: {NUMBER.format('n')}")


class Kernel:
    """A ``@triton.jit`` function and what was compiled of it. Used as the decorator ``@kernel``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.jit = triton.jit(function)
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        parameters = inspect.signature(function).parameters
        self.constexprs = [n for n, p in parameters.items() if "constexpr" in str(p.annotation)]
        passed = [n for n in parameters if n not in self.constexprs]
        self.tensors = [n for n in passed if n.isupper()]
        self.numbers = [n for n in passed if not n.isupper()]
        if self.tensors + self.numbers + self.constexprs != self.jit.arg_names:
            raise TypeError(f"{self.__name__}: tensors come first, then numbers, then constexprs")
        self._compiled: dict[Any, dict[tuple[Any, ...], Any]] = {}
        self._code: dict[tuple[str, ...], CodeType] = {}

    def launch(
        self, programs: int, *, num_warps: int = 4, num_stages: int = 3, num_ctas: int = 1,
        **named: Any,
    ) -> Launch:  # fmt: skip
        """The launch of ``programs`` programs, all on axis x, whose limit is 2**31 - 1.

        Args:
            num_ctas: blocks of threads that share a program: more than one where
                :func:`has_clusters` says so.
            named: all of the kernel's constexprs, and its numbers but those that will differ at
                every call.

        Raises:
            TypeError: a constexpr is missing, or a name is not the kernel's.
        """
        constants = {name: named.pop(name) for name in self.constexprs if name in named}
        if len(constants) < len(self.constexprs) or not set(named) <= set(self.numbers):
            raise TypeError(
                f"{self.__name__} takes the numbers {self.numbers} and all of the constexprs "
                f"{self.constexprs}, but was given {[*named, *constants]}"
            )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if num_ctas > 1:
            options["num_ctas"] = num_ctas
        return self._bind(programs, named, options, constants)

    def variant(
        self, numbers: dict[str, Any], options: dict[str, int], constants: dict[str, Any]
    ) -> Any:
        """What the kernels compiled for these are kept under. Functions count by ``id`` (the
        compiled kernel keeps them alive): Triton hashes them by their source, at every call."""
        kinds = [_kind(numbers[n]) if n in numbers else None for n in self.numbers]
        values = [id(c) if type(c) is JITFunction else c or repr(c) for c in constants.values()]
        return *kinds, *options.values(), *values

    def _bind(
        self, programs: int, numbers: dict[str, Any], options: dict[str, int],
        constants: dict[str, Any],
    ) -> Launch:  # fmt: skip
        jit, interpreted = self.jit, not isinstance(self.jit, JITFunction)
        # of no programs nothing is ever ready
        kept = self._compiled if programs else {}
        compiled = kept.setdefault(self.variant(numbers, options, constants), {})

        def by_triton(key: tuple[Any, ...], *tensors: Tensor | None, **others: Any) -> None:
            """Every launch but those of a compiled kernel on the current device that nobody
            observes."""
            if not programs:
                return
            every = {**numbers, **others}
            given = args = *tensors, *[every[name] for name in self.numbers]
            device = self._device(tensors)
            if interpreted and device.type != "meta":
                args = _in_float32(args)
            for observer in _observers[-1:]:
                observer(jit, programs, args, constants, options)
            if device.type == "meta":
                return
            if interpreted:
                _take_arrays_of_one_element_as_integers()
                # a GPU does not report an overflow, nor what masked lanes compute
                with np.errstate(all="ignore"):
                    jit[(programs,)](*args, **constants, **options)
                _round_back(given, args)
                return
            with torch.cuda.device(device):
                # hooks must see every launch
                hooks = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
                if key in compiled and not _observers and not any(hooks):
                    launch(*tensors, **others)
                    return
                binary = jit[(programs,)](*args, **constants, **options)
            # the last so that it lives: newer versions of triton unload what nobody refers to
            compiled[key] = (
                device.index, binary.run, binary.function, binary.packed_metadata, binary,
            )  # fmt: skip

        launch = self._generated(numbers, compiled, by_triton, programs, constants.values())
        launch.programs, launch.numbers = programs, numbers
        return launch

    def _device(self, args: tuple[Any, ...]) -> torch.device:
        devices = list(dict.fromkeys(a.device for a in args if isinstance(a, Tensor)))
        if not devices:
            raise RuntimeError(f"{self.__name__} was launched without a tensor")
        if len(devices) > 1:
            raise RuntimeError(
                f"Expected all tensors of {self.__name__} to be on the same device, "
                f"but found {devices[0]} and {devices[1]}"
            )
        return devices[0]

    def _generated(
        self, numbers: dict[str, Any], compiled: dict[tuple[Any, ...], Any],
        by_triton: Callable[..., None], programs: int, constants: Iterable[Any],
    ) -> Launch:  # fmt: skip
        """A launch, written out argument by argument: a loop over them would take twice as long.

        What a launch was made with is not looked at again: the key has only the tensors and the
        other numbers. Tensors of two devices give a key that no kernel has. The driver is given
        addresses: it would ask a tensor for its address again, and then the GPU whether that is one
        of its own.
        """
        others = tuple([name for name in self.numbers if name not in numbers])
        if others not in self._code:
            addresses = [f"_{name}" for name in self.tensors]
            parts = [TENSOR.format(t) for t in self.tensors] + [NUMBER.format(n) for n in others]
            key = "".join(f"{part}, " for part in parts)
            args = ", ".join([*self.tensors, *others])
            by_name = ", ".join([*self.tensors, *[f"{name}={name}" for name in others]])
            passed = [name if name in others else f"_{name}" for name in self.numbers]
            source = f"""
def launch({args}):
    {" = ".join([*addresses, "None"])}
    _ready = _get(_key := ({key}))
    if (
        _ready is None or _ready[0] != _device() or _observers
        or _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls
    ):
        _by_triton(_key, {by_name})
    else:
        _ready[1](_programs, 1, 1, _stream(_ready[0]), _ready[2], _ready[3], None, None, None,
                  {", ".join([*addresses, *passed])}, *_constants)
"""
            made: dict[str, Any] = {}
            exec(compile(source, f"<launch of {self.__name__}>", "exec"), made)
            self._code[others] = made["launch"].__code__
        space: dict[str, Any] = {
            **{f"_{name}": value for name, value in numbers.items()},
            "_get": compiled.get, "_observers": _observers, "_runtime": knobs.runtime,
            "_by_triton": by_triton, "_programs": programs, "_constants": tuple(constants),
            "_device": getattr(torch._C, "_cuda_getDevice", lambda: None),
            "_stream": getattr(torch._C, "_cuda_getCurrentRawStream", None),
        }  # fmt: skip
        return FunctionType(self._code[others], space)  # type: ignore[return-value]


kernel = Kernel


def planned(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a family's ``plan``: what it made for some arguments is made once.

    The numbers of an op are its ``*parameters``: of those 0.0 and -0.0 are told apart.
    """
    code = make.__code__
    if not code.co_flags & inspect.CO_VARARGS:
        return lru_cache(PLANS)(make)
    first = code.co_argcount

    @lru_cache(PLANS)
    def made(zeros: str | None, *args: Any) -> Any:
        return make(*args)

    @wraps(make)
    def plan(*args: Any) -> Any:
        return made(repr(args[first:]) if 0.0 in args[first:] else None, *args)

    plan.cache_clear = made.cache_clear  # type: ignore[attr-defined]
    return plan


@cache
def _take_arrays_of_one_element_as_integers() -> None:
    """Lets the interpreter loop to a bound that is no constant: before triton 3.7 numpy 2.4 forbids
    what it does (triton issue 9171)."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if _TRITON < (3, 7):
        interpreter._patch_lang_tensor = patched


def _in_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """bfloat16 tensors in float32, storage and strides alike: two views of one storage still are.

    Triton's interpreter stores bfloat16 as bit patterns (triton issues 4972 and 11584): it
    truncates where a GPU rounds to nearest, and maximum and dot see integers. A kernel that
    computes in float32 and rounds at its stores, as ours do, gives the GPU's numbers this way.
    """
    copies: dict[int, Tensor] = {}

    def wide(a: Any) -> Any:
        if not _is_bfloat16(a):
            return a
        copy = copies.setdefault(a.untyped_storage().data_ptr(), _storage(a).float())
        return copy.as_strided(a.size(), a.stride(), a.storage_offset())

    return tuple(map(wide, args))


def _round_back(given: tuple[Any, ...], computed: tuple[Any, ...]) -> None:
    for a, b in zip(given, computed, strict=True):
        if _is_bfloat16(a):
            before, after = _storage(a), _storage(b)
            if not torch.equal(before.float().view(torch.int32), after.view(torch.int32)):
                before.copy_(after)


def _storage(t: Tensor) -> Tensor:
    """All of a tensor's storage, as a flat tensor."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def _is_bfloat16(a: Any) -> bool:
    return isinstance(a, Tensor) and a.dtype == torch.bfloat16


@contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Calls ``observer(kernel, programs, args, constexprs, options)`` before each launch, with the
    ``@triton.jit`` function. On meta tensors nothing else happens."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


@contextmanager
def meta_capability(capability: int) -> Iterator[None]:
    """Meta tensors are planned for as those of a GPU of this capability, 90 for 9.0; 0 is a GPU of
    another vendor."""
    _meta_capabilities.append(capability)
    has_clusters.cache_clear()
    try:
        yield
    finally:
        _meta_capabilities.pop()
        has_clusters.cache_clear()


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; on other devices a number that lets every path of a
    kernel be met at small sizes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


@cache
def has_clusters(device: torch.device) -> bool:
    """Whether several blocks of threads may share a program and read one another's memory: where
    the GPU has that, Triton's reductions work over it, and CUSTOM_BACKPROP_NO_CLUSTERS is not
    set."""
    if os.environ.get("CUSTOM_BACKPROP_NO_CLUSTERS") or _TRITON < (3, 9):
        return False
    if device.type == "meta":
        return _meta_capabilities[-1] >= 90
    if device.type != "cuda" or _HIP or knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``dtype`` is summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """Programs of ``b`` elements that ``a`` elements take. (triton.cdiv, called on the host, costs
    as much as a launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
