"""The seam: every primitive is an operator of PyTorch's dispatcher.

A primitive has one schema and up to three implementations: ``formula`` (the mathematics, always
there), ``aten`` (the quickest way through PyTorch's own operators; the formula where none is given)
and ``triton`` (a launcher of the kernels). The dispatcher then does what an if/else of ours could
not: fake tensors, ``torch.compile``, ``vmap``, autocast and modes meet an operator like any other.

Where plain tensors meet none of these, its answer is known from the device alone. It takes several
times as long to give it as to look, so it is not asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.compiler import is_compiling

from . import selection
from .kernels import kernels

LIBRARY = torch.library.Library("custom_backprop", "DEF")

#: name -> the operator, in the order of definition
PRIMITIVES: dict[str, torch._ops.OpOverload] = {}

#: operator -> the launcher of its kernels, for those of other libraries too: what
#: ``testing/offline.py`` calls on meta tensors
LAUNCHERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

_AUTOCAST = {
    "AutocastCPU": DispatchKeySet(DispatchKey.AutocastCPU),
    "AutocastCUDA": DispatchKeySet(DispatchKey.AutocastCUDA),
}


def primitive(
    schema: str,
    *,
    formula: Callable[..., Any],
    triton: Callable[..., Any],
    aten: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    library: torch.library.Library = LIBRARY,
) -> Callable[..., Any]:
    """Defines one primitive and registers its implementations.

    Args:
        schema: the operator's schema, without the library's name.
        formula: plain torch with the schema's signature and results. It also serves where nothing
            better is given.
        triton: the launcher of the kernels, usually ``launcher(family, name)``, so that triton is
            imported at the first use.
        aten: the same by PyTorch's operators, for the CPU.
        fake: the results' shapes, dtypes and strides on fake tensors. Default: the formula, which
            runs on them as well.
        vmap: ``vmap(info, in_dims, *args) -> (result, out_dims)``. Default: the formula, on batched
            tensors.
        library: where it is defined; a project that builds on this one passes a library of its own
            name.

    Returns:
        the operator, as a function, whose attribute ``kernels`` is ``triton``.
    """
    name = schema[: schema.index("(")]
    library.define(schema)
    operator = getattr(getattr(torch.ops, library.ns), name).default
    implementations = {"formula": formula, "aten": aten or formula, "triton": triton}

    def on_cpu(*args: Any) -> Any:
        backend = "aten" if selection._forced is None else selection.backend_for("cpu")
        return implementations[backend](*args)

    def on_cuda(*args: Any) -> Any:
        return implementations[selection.backend_for("cuda")](*args)

    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_cuda, "CUDA")
    for key, keyset in _AUTOCAST.items():
        library.impl(name, _without_autocast(operator, keyset), key)
    torch.library.register_fake(f"{library.ns}::{name}", fake or formula, lib=library)
    library.impl(name, _differentiable(operator, formula), "Autograd", with_keyset=True)
    if (
        vmap is None
    ):  # decomposed: the formula runs on the batched tensors (a vmap inside register_vmap's rule fails in functorch)
        library.impl(name, formula, "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"{library.ns}::{name}", vmap, lib=library)
    LAUNCHERS[operator] = triton
    if library is LIBRARY:
        PRIMITIVES[name] = operator

    by_aten = implementations["aten"]

    def call(*args: Any) -> Any:
        if not _unobserved(args):
            if not is_compiling() and "torch.distributed.tensor" in sys.modules:
                from .. import distributed  # noqa: F401 (its rules for DTensor are registered at the first use)
            return operator(*args)
        first = args[0]
        # a batch of gradients, which come first: by is_grads_batched, or by a torch.vmap that
        # autograd does not know of
        if is_batched(first):
            return operator(*args) if legacy_batched(first) else formula(*args)
        if first.is_cpu:
            return by_aten(*args) if selection._forced in BY_ATEN else on_cpu(*args)
        return on_cuda(*args) if first.is_cuda else operator(*args)

    call.kernels = triton  # type: ignore[attr-defined]
    return call


#: the types of a tensor that listens to nothing
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
#: what a subclass of Tensor is not
PLAIN = TENSORS | frozenset({type(None), bool, int, float, str, tuple, list, torch.dtype})
#: settings that leave CPU tensors to ATen
BY_ATEN = (None, "aten")
modes = torch._C._len_torch_dispatch_stack
functorch_active = torch._C._are_functorch_transforms_active
autocast_active = torch._C._is_any_autocast_enabled
batched, legacy_batched = (
    torch._C._functorch.is_batchedtensor,
    torch._C._functorch.is_legacy_batchedtensor,
)
#: a tensor as a transformation of torch.func sees it
wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def builtin(packet: Any, overload: str = "default") -> Callable[..., Any]:
    """An overload of one of PyTorch's operators, without the Python of its call."""
    return getattr(packet, overload)._op


def _unobserved(args: tuple[Any, ...]) -> bool:
    """Whether nobody could tell an operator of ours from the calls that it makes: neither subclass
    nor mode nor transformation."""
    return not (
        is_compiling() or modes() or functorch_active() or autocast_active()
    ) and PLAIN.issuperset(map(type, args))


def is_batched(dy: torch.Tensor) -> bool:
    """Whether ``dy`` is many gradients at once (``is_grads_batched=True``, torch.vmap over a
    backward), which no kernel can read."""
    return legacy_batched(dy) or batched(dy)


def launcher(family: str, name: str) -> Callable[..., Any]:
    """The launcher ``name`` of ``triton_kernels/<family>.py``, imported when it is called."""

    def call(*args: Any) -> Any:
        return getattr(kernels(family), name)(*args)

    return call


def _without_autocast(
    operator: torch._ops.OpOverload, keyset: DispatchKeySet
) -> Callable[..., Any]:
    """Casts are made once, above autograd (see ``ops/function.py``): what a primitive calls must
    not cast again."""

    def run(*args: Any) -> Any:
        with _ExcludeDispatchKeyGuard(keyset):
            return operator(*args)

    return run


def _differentiable(
    operator: torch._ops.OpOverload, formula: Callable[..., Any]
) -> Callable[..., Any]:
    """Where a primitive is met above autograd, without the Function that is built on it, its
    formula can be differentiated. So it is when Dynamo traces a transformation of torch.func, for
    which it takes a Function's forward to pieces."""

    def run(keys: DispatchKeySet, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or any(
            _tangent(t) is not None for t in tensors
        ):
            return formula(*args)
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return run


def _tangent(t: torch.Tensor) -> torch.Tensor | None:
    """What forward mode carries beside ``t``. (A compiled graph opens its level without Python's
    knowledge.)"""
    return torch._VF._unpack_dual(t, level=0)[1]  # type: ignore[attr-defined]


def fold_batch(
    tensors: tuple[torch.Tensor | None, ...], in_dims: tuple[Any, ...], size: int
) -> list[torch.Tensor | None]:
    """Moves each tensor's batch dimension to the front, and gives one (of stride 0) to those that
    have none."""
    return [
        None if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
