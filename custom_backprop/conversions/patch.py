"""Replaces the functions of ``torch.nn.functional`` that a model calls by ours.

The names in ``torch.nn.functional`` are rewritten while at least one patch is active, with
functions that ask whether one is active in their own thread or task. That costs 0.5 microseconds
in a call of such a function, and nothing in any other. A ``torch.overrides.TorchFunctionMode`` sees
each method and each attribute of a tensor, and costs 1 to 2 microseconds in all of them: 9 % of a
training step of a small Llama.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as stock
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import checkpoint

from .. import functional, nn
from ..backends.selection import PLAIN_TYPES, TENSORS, get_backend, is_traced
from ..dtensor import is_dtensor
from .deferred import of_head, unless_fused
from .generated import Members, made_of, subclass

F = TypeVar("F", bound=Callable[..., Any])
Model = TypeVar("Model", bound=torch.nn.Module)

#: on a CPU with fewer numbers a Function costs more than it gains
LEAST = 2**18

#: how many patches are active in this thread or task, one in another
_depth: ContextVar[int] = ContextVar("depth", default=0)


@overload
def patch() -> Patch: ...


@overload
def patch(model: Model) -> Model: ...


def patch(model: Any = None) -> Any:
    """Lets ``torch.nn.functional`` be ours: in a block, in a function, or in a model's forward.

    .. code-block:: python

        with custom_backprop.patch():       # a block
            loss = model(x)

        @custom_backprop.patch()            # a function
        def step(x): ...

        custom_backprop.patch(model)        # a model's forward, from now on

    Every name that ``torch.nn.functional`` and :mod:`custom_backprop.functional` both have is
    replaced, as it is called through the module: ``F.cross_entropy(...)``, by a layer of
    ``torch.nn``, or by a loss of Hugging Face. ``torch.softmax``, methods such as ``x.softmax()``,
    and what was imported by name before (``from torch.nn.functional import silu``) stay stock's.

    Other threads and tasks see stock's functions. Patches nest. What
    ``torch.utils.checkpoint`` computes again in backward runs under the patch of its forward.

    Stock's function runs where ours gains nothing: on a CPU all but those that
    :func:`custom_backprop.functional.arguments.gains_on_a_cpu` marks, and those too with few
    numbers; where a compiler, an exporter or a tracer looks on; for a tensor subclass; and with
    ``out=``. A forced backend is taken for all.

    Args:
        model: its class becomes a subclass of the same name, whose forward runs under a patch.
            ``inspect.signature(model.forward)``, ``state_dict``, ``copy.deepcopy`` and pickle stay
            as they are. In training its vocabulary head returns logits that are not computed until
            somebody asks for them: see :mod:`custom_backprop.conversions.deferred`.

    Returns:
        a context manager and decorator, or the ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a ``forward`` is set on ``model`` itself, and would hide that of its class.
    """
    if model is None:
        return Patch()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if "forward" in vars(model):
        raise ValueError(
            f"the forward of this {type(model).__name__} was replaced on the object: patch the "
            "model before"
        )
    if not is_patched(model):
        for head in _heads(model):
            _become(head, _deferring)
        _become(model, _patched)
    return model


def unpatch(model: Model) -> Model:
    """The opposite of ``patch(model)``."""
    for module in model.modules() if is_patched(model) else ():
        module.__class__ = unpatched(type(module))
    return model


def unpatched(cls: Any) -> Any:
    """The class that a module had before ``patch(model)``."""
    made = made_of(cls)
    return made[0] if made is not None and made[1] in (_patched, _deferring) else cls


def is_patched(model: torch.nn.Module) -> bool:
    """Whether ``patch(model)`` was called."""
    made = made_of(type(model))
    return made is not None and made[1] is _patched


def is_active() -> bool:
    """Whether a patch is active in this thread or task."""
    return not is_traced() and _depth.get() > 0


class Patch:
    """The context manager and decorator that :func:`patch` returns. It has no state of its own."""

    def __enter__(self) -> Patch:
        if not is_traced():
            depth = _depth.get()
            _depth.set(depth + 1)
            if not depth:
                _install(1)
        return self

    def __exit__(self, *exception: object) -> None:
        if not is_traced():
            depth = _depth.get() - 1
            _depth.set(depth)
            if not depth:
                _install(-1)

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if is_traced():  # Dynamo enters no context manager of a closure
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return patched  # type: ignore[return-value]


def _become(module: torch.nn.Module, members: Members) -> None:
    base: type = type(module)
    module.__class__ = subclass(base, members)


def _patched(base: Any) -> dict[str, Any]:
    patched = Patch()(base.forward)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = patched(self, *args, **kwargs)
        if self._forward_hooks and not is_traced():  # FSDP's takes the weights of the head away
            return unless_fused(output)
        return output

    return {"forward": forward}


def _deferring(base: Any) -> dict[str, Any]:
    """Of a vocabulary head."""
    stock = base.forward

    @functools.wraps(stock)
    def forward(self: torch.nn.Linear, input: Tensor) -> Tensor:
        found = of_head(self, input) if is_active() else None
        return stock(self, input) if found is None else found

    return {"forward": forward}


def _heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers that make logits of a vocabulary: what ``get_output_embeddings()`` returns;
    else the one layer that has the shape of an embedding."""
    modules = list(model.modules())
    asked: list[Any] = [m for m in modules if hasattr(m, "get_output_embeddings")]
    found = [head for m in asked if (head := m.get_output_embeddings()) is not None]
    if not found:
        tables = [m.weight.shape for m in modules if isinstance(m, torch.nn.Embedding)]
        found = [m for m in modules if _is_linear(m) and m.weight.shape in tables]
        found = found if len(found) == 1 else []
    return [m for m in dict.fromkeys(found) if _is_linear(m)]


def _is_linear(module: Any) -> bool:
    return type(module) in (torch.nn.Linear, nn.Linear)


def _choice(name: str, its: Callable[..., Any]) -> Callable[..., Any]:
    """Ours where a patch is active, else stock's."""
    ours = getattr(functional, name)
    gains = hasattr(ours, "gains_on_a_cpu")

    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        stays = not gains and args and type(args[0]) in TENSORS and args[0].is_cpu
        depth = 0 if (stays and get_backend() is None) or is_traced() else _depth.get()
        if depth and "out" not in kwargs and _is_for_ours(given, gains):
            _depth.set(0)  # what ours leaves to stock is stock's
            try:
                return ours(*args, **kwargs)
            finally:
                _depth.set(depth)
        if has_torch_function(given):  # stock would say that it is the function of this name: this
            return handle_torch_function(its, given, *args, **kwargs)
        return its(*args, **kwargs)

    return functools.wraps(its)(call)


def _is_for_ours(given: tuple[Any, ...], gains: bool) -> bool:
    on_a_cpu, most = False, 0
    for a in given:
        kind = type(a)
        if kind in TENSORS or (isinstance(a, Tensor) and is_dtensor(a)):
            if a.is_cpu:
                on_a_cpu, most = True, max(most, a.numel())
        elif kind not in PLAIN_TYPES and hasattr(kind, "__torch_function__"):
            return False
    return not on_a_cpu or (gains and most >= LEAST) or get_backend() is not None


class _Recomputed(checkpoint.CheckpointFunction):
    """Reentrant checkpoints whose function is run again under the patch."""

    @staticmethod
    def apply(function: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        return _REENTRANT.apply(_again(function), *args)


_REENTRANT = checkpoint.CheckpointFunction


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    return Patch()(function) if is_active() else function


def _checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _STOCK_CHECKPOINT(_again(function), *args, **kwargs)


_STOCK_CHECKPOINT = checkpoint._checkpoint_without_reentrant_generator
_STOCK = {name: getattr(stock, name) for name in functional.__all__ if hasattr(stock, name)}

#: (the namespace, the name, what stands there, what replaces it)
_NAMES = [
    *((vars(stock), name, its, _choice(name, its)) for name, its in _STOCK.items()),
    # what torch.utils.checkpoint.checkpoint calls, however it was imported
    (vars(checkpoint), "CheckpointFunction", _REENTRANT, _Recomputed),
    (vars(checkpoint), _STOCK_CHECKPOINT.__name__, _STOCK_CHECKPOINT, _checkpointed),
]

_lock = threading.Lock()
_users = 0


def _install(change: int) -> None:
    """One thread or task more or less that needs the names rewritten. What somebody else has put
    there stays."""
    global _users
    with _lock:
        before, _users = _users, _users + change
        if bool(before) != bool(_users):
            for names, name, its, ours in _NAMES:
                old, new = (its, ours) if _users else (ours, its)
                if names.get(name) is old:
                    names[name] = new
