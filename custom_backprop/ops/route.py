"""Decides what runs in a call, which depends on who watches it. Only this file knows.

An op is written once, as a definition with three static methods that do not know where they run.
:func:`op` turns it into the function that :mod:`custom_backprop.functional` calls.

| who watches                         | what ``run`` is                          | Function      |
|-------------------------------------|------------------------------------------|---------------|
| nobody                              | the implementation of the tensor's       | eager         |
|                                     | device, or the forced one, itself        |               |
| a mode, a subclass, autocast        | the dispatcher's operator                | eager         |
| functorch, forward mode             | the operator, with vmap and jvp          | transformable |
| Dynamo                              | what the primitive shows a compiler: its | eager         |
|                                     | formula, or on a GPU its kernel          |               |
| torch.export, ONNX, torch.jit.trace | the formula                              | none          |
| a backward that is differentiated   | the formula                              | -             |
| or batched                          |                                          |               |

Two Functions are built from a definition. ``torch.compile`` refuses a Function that defines
``jvp``; forward mode and ``torch.func`` need ``jvp``, and a ``setup_context``, which triples the
overhead.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.library import Primitive
from ..backends.selection import (
    TENSORS,
    backend_of,
    functorch_active,
    get_backend,
    is_batched,
    is_plain,
    is_traced,
    is_transformed,
    is_wrapped,
)
from ..dtensor import is_dtensor

F = TypeVar("F", bound=Callable[..., Any])

_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_dynamo_compiling


#: what autocast does to an op's floating-point inputs, as for torch's own: it casts half precision
#: up to float32, or float32 down to the autocast dtype
FLOAT32 = {"cpu": "float32", "cuda": "float32"}
LOWER = {"cpu": "lower", "cuda": "lower"}
#: or nothing: the op has an argument that tells its primitives what to cast
OWN = {"cpu": "own", "cuda": "own"}


class Definition(Protocol):
    """The argument of :func:`op`: a class of static methods.

    Attributes:
        forward_op, backward_op: the primitives.
        outputs: how many. Default: 1. If more, forward_op returns a tuple of them.
        has_statistics: forward_op returns ``(*outputs, *statistics)``. ``setup_context`` may save
            the statistics; they are not outputs of the op.
        autocast: what autocast does on each device, such as :data:`FLOAT32`. Default: nothing.

    Forward is ``forward_op``. ``setup_context(ctx, inputs, output)`` saves tensors, only through
    ``save_for_backward``. ``backward(run, ctx, dy)`` returns the gradient of the first argument, or
    a tuple of those of the first few arguments, in which a gradient that is not needed may be
    anything. It gets one dy for each output; if there are several, some may be None, not all.
    ``run`` is an implementation of ``backward_op``. ``ctx.is_differentiated`` is true if the result
    of backward is itself differentiated: statistics are constants then, and must be computed again.
    ``jvp(ctx, *tangents)`` gets the same saved tensors, and returns a tuple if there are several
    outputs.
    """

    forward_op: Primitive
    backward_op: Primitive


def op(definition: Any, stock: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function of one definition.

    Args:
        definition: see :class:`Definition`.
        stock: PyTorch's own function, which is called for what the formulas do not support:
            integers, complex numbers and nested tensors.
    """
    forward_op, backward_op = definition.forward_op, definition.backward_op
    setup_context, define_backward = definition.setup_context, definition.backward
    has_statistics: bool = getattr(definition, "has_statistics", False)
    count: int = getattr(definition, "outputs", 1)
    returned = slice(count) if count > 1 else 0
    is_tuple = has_statistics or count > 1
    autocast: dict[str, str] = getattr(definition, "autocast", {})

    def value(which: str, args: tuple[Any, ...]) -> Any:
        """The outputs without the statistics."""
        output = getattr(forward_op, which)(*args)
        return output[returned] if is_tuple else output

    def forward(ctx: Any, *args_and_which: Any) -> Any:
        args = args_and_which[:-1]
        output = getattr(forward_op, args_and_which[-1])(*args)
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, output)
        return output[returned] if is_tuple else output

    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        needs, dys = ctx.needs_input_grad, dys[:count]
        given = dys if count == 1 else [dy for dy in dys if dy is not None]
        if not given or given[0] is None:
            return (None,) * len(needs)
        which = _for_gradient(*given)
        ctx.is_differentiated = which == "derivative"
        ctx.which = which = "formula" if which == "derivative" else which
        if autocast and _compiling():  # a compiler runs backward under the autocast of forward
            with torch.autocast(given[0].device.type, enabled=False):
                grads = define_backward(getattr(backward_op, which), ctx, *dys)
        else:
            grads = define_backward(getattr(backward_op, which), ctx, *dys)
        if type(grads) is tuple:
            grads = [g if need else None for g, need in zip(grads, needs, strict=False)]
            return *grads, *(None,) * (len(needs) - len(grads))
        return grads, *(None,) * (len(needs) - 1)

    # if no gradient is needed, Dynamo counts the parameters of forward, and leaves out ctx if there
    # are as many as arguments
    forward.__signature__ = inspect.Signature()  # type: ignore[attr-defined]

    def transformable_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if has_statistics:
            ctx.mark_non_differentiable(*output[count:])
            ctx.statistics = len(output) - count
        ctx.set_materialize_grads(False)
        setup_context(_Saving(ctx), inputs, output)

    def transformable_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(_Saved(ctx), *grads)

    def transformable_jvp(ctx: Any, *tangents: Any) -> Any:
        result = definition.jvp(_Saved(ctx), *tangents)
        if not has_statistics:
            return result
        return *(result if count > 1 else (result,)), *(None,) * ctx.statistics

    eager = _function(definition, forward=forward, backward=backward)
    transformable = _function(
        definition,
        generate_vmap_rule=True,
        forward=forward_op.operator,
        setup_context=transformable_setup,
        backward=transformable_backward,
        jvp=transformable_jvp,
    )
    # Function.apply in Python only checks for functorch, which cannot be active where this is
    # called; it is a third of the overhead. That of a backward only chooses between two names for
    # it.
    apply = super(torch.autograd.Function, eager).apply  # type: ignore[misc]
    eager._backward_cls.apply = backward

    def call(*args: Any) -> Any:
        if not is_plain(args) or not args[0].is_floating_point() or args[0].is_nested:
            return watched(args)
        which = backend_of(args[0])
        if _grad_enabled():
            for a in args:
                if type(a) in TENSORS and a.requires_grad:
                    return apply(*args, which)
        output = getattr(forward_op, which)(*args)
        return output[returned] if is_tuple else output

    def watched(args: tuple[Any, ...]) -> Any:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args)
        if stock is not None and not is_ours(args[0]):
            return stock(*args)
        device = args[0].device.type
        args = _cast(args, device, autocast.get(device))
        if is_traced():
            if device in autocast and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):  # which would cast inside the formula
                    return traced(args)
            return traced(args)
        if any(is_dtensor(a) for a in args):
            from .. import distributed  # noqa: F401 (its rules are registered at the first use)
        if is_transformed():
            several = has_statistics or sum([isinstance(a, Tensor) for a in args]) > 1
            if _is_beyond_a_function(several):
                return value("formula", args)
            outputs = transformable.apply(*args)
            return outputs[returned] if is_tuple else outputs
        return apply(*args, "operator") if _grad_enabled() else value("operator", args)

    def traced(args: tuple[Any, ...]) -> Any:
        if functorch_active() or not _compiling() or torch.compiler.is_exporting():
            return value("exported", args)
        return eager.apply(*args, "operator" if get_backend() == "triton" else "traced")

    call.__name__ = call.__qualname__ = definition.__name__
    call.__doc__, call.__module__ = definition.__doc__, definition.__module__
    call.definition = definition  # type: ignore[attr-defined]
    return call


def overridable(function: F) -> F:
    """Decorator for a function that checks its arguments before it calls an op. A subclass, a
    function mode or ``torch.fx`` may override the function, and sees one call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            given = (*args, *kwargs.values())
            return handle_torch_function(call, given, *args, **kwargs)
        if torch._C._get_tracing_state():
            with warnings.catch_warnings():  # compared sizes become constants of the trace
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def run_of_gradient(backward_op: Primitive, dy: Tensor) -> Callable[..., Any]:
    """What the backward of an ordinary Function calls instead of ``backward_op``."""
    which = _for_gradient(dy)
    return backward_op.formula if which == "derivative" else getattr(backward_op, which)


def _for_gradient(*dys: Tensor) -> str:
    """The name of the implementation for backward; or "derivative", which means the formula,
    because the result of backward is itself differentiated or batched."""
    if _compiling():
        return "operator" if get_backend() == "triton" else "traced"
    if _grad_enabled() or forward_ad._current_level >= 0:
        return "derivative"
    for dy in dys:
        if is_wrapped(dy) or is_batched(dy):
            return "derivative"
    return backend_of(dys[0]) if is_plain(dys) else "operator"


def is_ours(x: Any) -> bool:
    """Whether the formulas support such a tensor: floating-point and not nested."""
    return isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested


def _is_beyond_a_function(several: bool) -> bool:
    """Whether torch.func's transformations around this call would be wrong with a Function.

    Forward mode inside forward mode treats the tangents of a Function's jvp as constants. Forward
    mode over vmap fails on an input or output without a tangent, which only an op of ``several``
    tensors has.
    """
    levels = [level.key() for level in get_interpreter_stack() or ()]
    forward = levels.count(TransformType.Jvp)
    over_vmap = forward == 1 and TransformType.Vmap in levels[levels.index(TransformType.Jvp) :]
    return forward > 1 or (over_vmap and several)


def _cast(args: tuple[Any, ...], device: str, policy: str | None) -> tuple[Any, ...]:
    """Casts as autocast does for torch's own operator. Primitives then ignore autocast
    (``backends/library.py``)."""
    if policy in (None, "own") or not torch.is_autocast_enabled(device):
        return args
    target = torch.get_autocast_dtype(device) if policy == "lower" else torch.float32
    return tuple(
        a.to(target)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in args
    )


def _function(definition: Any, **members: Any) -> Any:
    methods = {k: staticmethod(m) if callable(m) else m for k, m in members.items()}
    described = {"__doc__": definition.__doc__, "__module__": definition.__module__}
    return type(definition.__name__, (torch.autograd.Function,), {**described, **methods})


class _Saving:
    """The context of the transformable Function in ``setup_context``.

    functorch does not accept None among saved tensors, so this leaves it out, and :class:`_Saved`
    restores it. Forward mode may need inputs that no gradient needs, so all of them count as
    needed.
    """

    def __init__(self, ctx: Any) -> None:
        vars(self)["ctx"] = ctx

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        return (True,) * len(self.ctx.needs_input_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        present = [t for t in tensors if t is not None]
        self.ctx.absent = [t is None for t in tensors]
        self.ctx.save_for_backward(*present)
        self.ctx.save_for_forward(*present)


class _Saved:
    """The same context in ``backward`` and ``jvp``."""

    def __init__(self, ctx: Any) -> None:
        vars(self)["ctx"] = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        present = iter(self.ctx.saved_tensors)
        return tuple([None if absent else next(present) for absent in self.ctx.absent])
