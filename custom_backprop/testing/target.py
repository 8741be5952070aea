"""Code that is named: ``pkg.module:function``, and the reference that a function is itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .case import outputs
from .inputs import Inputs


class TargetError(ValueError):
    """A name that nothing has, or of something that cannot be called."""


@dataclass(frozen=True)
class Target:
    """A callable found by name.

    Attributes:
        value: a function, or a module.
        imports: the lines that a script needs, to write it as...
        expression: this.
    """

    value: Any
    imports: tuple[str, ...]
    expression: str


def target(name: str, init: str = "") -> Target:
    """Finds ``pkg.module:attribute.attribute``; or, without a colon, ``torch.nn.functional.silu``.

    - An autograd Function is taken as its ``apply``.
    - A module's class is instantiated, with the arguments ``init``, in the grammar of
      :mod:`custom_backprop.testing.inputs`.
    - A function without parameters is a factory, and is called; so is any function if ``init`` is
      given.

    Raises:
        TargetError: there is none of this name, or it cannot be called.
    """
    found = named(name)
    value = found.value
    arguments = Inputs.parse(init) if init else None
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        return replace(found, value=value.apply, expression=f"{found.expression}.apply")
    if not callable(value):
        raise TargetError(f"{name}, of type {type(value).__name__}, cannot be called")
    if arguments or _makes(value):
        sample = arguments.make() if arguments else None
        try:
            made = value(*sample.args, **sample.kwargs) if sample else value()
        except Exception as error:
            raise TargetError(
                f"{found.expression}({init}) raises {type(error).__name__}: {error}"
                + ("" if init or not isinstance(value, type) else " (give its arguments: --init)")
            ) from error
        if not callable(made):
            raise TargetError(f"{name}() made a {type(made).__name__}, which cannot be called")
        return replace(found, value=made, expression=f"{found.expression}({init})")
    return found


def _makes(value: Any) -> bool:
    """Whether it makes what is meant: a class of modules, or a function without parameters."""
    if isinstance(value, type):
        return True
    if not inspect.isfunction(value):
        return False
    return not inspect.signature(value).parameters


def named(name: str) -> Target:
    """What has this name, as it is.

    Raises:
        TargetError: nothing has it.
    """
    module, colon, path = name.partition(":")
    if not colon:
        if name.startswith("torch.ops."):
            return Target(_attributes(torch, name[6:], "torch"), ("import torch",), name)
        module, _, path = name.rpartition(".")
        while module and not _is_module(module):  # a class's attribute
            module, _, last = module.rpartition(".")
            path = f"{last}.{path}"
    if not module or not path:
        raise TargetError(f"{name}: write pkg.module:callable, or torch.ops.namespace.operator")
    value = _attributes(_imported(module), path, module)
    if module.split(".")[0] == "torch":
        return Target(value, ("import torch",), f"{module}.{path}")
    return Target(value, (f"from {module} import {path.partition('.')[0]}",), path)


def _is_module(name: str) -> bool:
    try:
        _imported(name)
    except TargetError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            return False
        raise
    return True


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        raise TargetError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _attributes(owner: Any, path: str, name: str) -> Any:
    for attribute in path.split("."):
        try:
            owner = getattr(owner, attribute)
        except AttributeError as error:
            raise TargetError(f"{name} has no {attribute}") from error
        name = f"{name}.{attribute}"
    return owner


def own_forward(function: Callable[..., Any] | nn.Module) -> Callable[..., Any]:
    """A reference made of a function itself: each autograd Function that it calls runs its own
    ``forward`` as plain torch, which autograd differentiates.

    It serves where ``forward`` is written in differentiable torch: then ``backward`` is compared
    with what autograd derives. What ``forward`` detaches is not differentiated here either.

    Args:
        function: a function or module; ``apply`` of a Function; or an operator made by
            ``torch.library.custom_op``, whose body is taken.

    The result raises RuntimeError when it is called, if ``forward`` is not plain torch, so that
    nothing can be differentiated.
    """
    if isinstance(function, nn.Module):
        return _own_module(function)
    owner = getattr(function, "__self__", None)
    is_function = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    body = getattr(function, "_init_fn", function)  # of a custom operator

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        with patch.object(torch.autograd.Function, "apply", classmethod(_forward)):
            result = _forward(owner, *args) if is_function else body(*args, **kwargs)
        return _differentiable(result, args)

    return call


def _own_module(module: nn.Module) -> nn.Module:
    """A copy of the module, with the same parameters, whose Functions run their own forward."""

    class Own(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with patch.object(torch.autograd.Function, "apply", classmethod(_forward)):
                result = super().forward(*args, **kwargs)
            return _differentiable(result, (*args, *self.parameters()))

    own = copy.copy(module)
    own.__class__ = Own
    return own


def _differentiable(result: Any, args: tuple[Any, ...]) -> Any:
    """The result, unless autograd lost it."""
    if (
        torch.is_grad_enabled()
        and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        and not any(r.requires_grad for r in outputs(result))
    ):
        raise RuntimeError("its own forward is not plain torch: autograd sees no operation")
    return result


class _Context:
    """Stands in for the ctx of a Function, and saves nothing."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        self.constants: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None: ...

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_dirty(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constants = tensors


def _forward(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.apply(*args)`` as a plain function."""
    ctx = _Context(args)
    if cls.setup_context == torch.autograd.Function.setup_context:
        result = cls.forward(ctx, *args, **kwargs)
    else:
        result = cls.forward(*args, **kwargs)
        cls.setup_context(ctx, args, result)
    constants = {id(t) for t in ctx.constants}
    return tree_map_only(Tensor, lambda t: t.detach() if id(t) in constants else t, result)
