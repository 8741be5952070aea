"""Who watches a call; and which implementation of a primitive runs where nobody does: chosen by the
device of its tensors, or forced with :func:`use_backend`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("aten", "formula", "triton")

_forced: str | None = None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(backend: str, device_type: str) -> str | None:
    """The reason why ``backend`` cannot run on tensors of ``device_type``, or None if it can."""
    if backend != "triton":
        return None
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting() and device_type != "cpu":
        return "TRITON_INTERPRET=1 makes kernels run in the interpreter, on CPU tensors only"
    if device_type == "cpu" and not interpreting():
        return (
            "Triton kernels need a GPU; set TRITON_INTERPRET=1 before the first import to run them "
            "in the interpreter"
        )
    return None


def backend_for(device_type: str) -> str:
    """The backend that a primitive takes on tensors of ``device_type``."""
    if _forced is None:
        return "triton" if device_type == "cuda" and _kernels_run_on_cuda() else "aten"
    if _forced == "triton" and (reason := why_not("triton", device_type)) is not None:
        raise RuntimeError(f"backend 'triton' cannot run on {device_type} tensors: {reason}")
    return _forced


class use_backend:
    """Forces the backend of every primitive: as a setting, ``use_backend("aten")``, or as a context
    manager.

    Args:
        backend: ``"aten"`` (PyTorch's own operators), ``"triton"`` (the kernels; on CPU tensors
            only in Triton's interpreter), ``"formula"`` (the mathematics of
            :mod:`custom_backprop.formulas`), or None (chosen by device, the default).

    The setting belongs to the process, as torch's own backend flags do: autograd runs backward on
    threads of its own.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run on this machine at all. Tensors that it cannot run on
            raise when they are met.
    """

    def __init__(self, backend: str | None) -> None:
        global _forced
        if backend is not None and backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"unknown backend {backend!r}: choose one of {known} or None")
        if backend == "triton":
            has_gpu = not interpreting() and torch.cuda.is_available()
            if (reason := why_not("triton", "cuda" if has_gpu else "cpu")) is not None:
                raise RuntimeError(f"backend 'triton' cannot run here: {reason}")
        self._backend = backend
        self._previous = _forced
        _forced = backend

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._previous

    def __repr__(self) -> str:
        return f"use_backend({self._backend!r})"


def get_backend() -> str | None:
    """The forced backend, or None while each tensor's device decides."""
    return _forced


def backend_of(t: torch.Tensor) -> str:
    """The implementation that a primitive takes on a plain tensor; "operator" where only the
    dispatcher knows, as on the meta device.

    Raises:
        RuntimeError: the forced backend cannot run on its device.
    """
    if t.is_cpu:
        return "aten" if _forced is None else backend_for("cpu")
    if t.is_cuda:
        return "triton" if _forced is None and _kernels_run_on_cuda() else backend_for("cuda")
    return "operator"


@cache
def _kernels_run_on_cuda() -> bool:
    """Found out once: what is installed stays, and the interpreter's setting counts when a kernel
    is decorated."""
    return why_not("triton", "cuda") is None


#: the types of a tensor that listens to nothing
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
#: those and the types that hide no tensor
PLAIN_TYPES = TENSORS | frozenset({type(None), bool, int, float, str, tuple, list, torch.dtype})

_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled
is_batched = torch._C._functorch.is_legacy_batchedtensor
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_compiling = torch.compiler.is_dynamo_compiling


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody watches a call with these arguments: no subclass, no mode, no transformation,
    no autocast, no tracer. This is the one function that knows all of them."""
    return not (
        _compiling()  # first: Dynamo answers it, and cannot trace the rest
        or _modes()
        or _function_modes()
        or functorch_active()
        or _autocast_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    ) and PLAIN_TYPES.issuperset(map(type, args))


def is_autocast(t: torch.Tensor) -> bool:
    """Whether autocast is on for the device of ``t``. Of meta torch may not be asked."""
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


def is_traced() -> bool:
    """Whether a compiler, an exporter or a tracer looks on: it is shown a formula, and no value is
    looked at."""
    return bool(
        _compiling() or torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    )


def is_transformed() -> bool:
    """Whether a transformation of torch.func or forward mode is at work, which differentiates
    backward itself."""
    return functorch_active() or forward_ad._current_level >= 0


saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class watch_saved(torch.autograd.graph.saved_tensors_hooks):
    """Calls ``look`` with each tensor that is saved for backward in a block. Other hooks may want
    to move or change them, so that some ops save other tensors there; this one is not minded."""

    def __init__(self, look: Callable[[torch.Tensor], object]) -> None:
        def pack(t: torch.Tensor) -> torch.Tensor:
            look(t)
            return t

        super().__init__(pack, unchanged)


def unchanged(t: torch.Tensor) -> torch.Tensor:
    return t


def are_saved_tensors_hooked() -> bool:
    """Whether a hook gets what is saved for backward, and does more than look at it."""
    hooks = saved_tensor_hooks(True)
    return hooks is not None and hooks[1] is not unchanged
