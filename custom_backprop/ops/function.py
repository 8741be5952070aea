"""Turns one written-out derivative into the two faces that PyTorch's transformations need.

``torch.compile`` refuses a Function that defines ``jvp``; forward-mode AD and ``torch.func`` need
one with ``setup_context``, which costs three times the overhead. So each op is written once, and
:func:`differentiable` makes both.

Where an op is called often on small tensors, two more faces are worth writing, for plain tensors in
eager mode, which need none of the
rest: ``direct_value``, ``direct_forward`` and ``direct_backward`` go to ATen in the fewest calls,
on a CPU, and ``kernel_value`` and so on to the kernels, on a GPU. Between two passes over large
tensors every Python frame and every lookup is fetched from memory again, some
microseconds each, and a GPU waits for the host wherever its work is short: what is asked on that
way is counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ..backends import selection
from ..backends.library import (
    BY_ATEN,
    PLAIN,
    TENSORS,
    autocast_active,
    functorch_active,
    legacy_batched,
    modes,
    wrapped,
)
from ..backends.selection import takes_kernels

_tracing = torch.compiler.is_dynamo_compiling  # which Dynamo answers; what follows it cannot trace
_grad_enabled = torch.is_grad_enabled


def differentiable(
    *,
    autocast_cpu: str | None = None,
    autocast_cuda: str | None = None,
    keeps: bool = False,
    unary: bool = False,
    overwrites: bool = False,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    stock: Callable[..., Any] | None = None,
) -> Callable[[type], Callable[..., Any]]:
    """Class decorator: a definition (static methods ``forward``, ``setup_context``, ``backward``,
    ``jvp``) -> the callable op.

    A definition may also have ``direct_value(*args)``, which computes y, ``direct_forward(ctx,
    *args)``, which fills the context for ``backward`` as well, and with them ``direct_backward(ctx,
    dy)``, for a dy that is a plain CPU tensor and will not be differentiated; and the same three by
    ``kernel_``, for tensors that the kernels take.

    Args:
        autocast_cpu, autocast_cuda: what autocast does to the op's floating-point inputs on that
            device, as torch does to its own: ``"lower"`` casts float32 to the autocast dtype,
                ``"float32"`` casts float16 and bfloat16 up, None leaves them.
        keeps: ``forward`` returns ``(y, kept)`` and the op y alone: ``kept`` is for
            ``setup_context`` to save. Only where a transformation must see it is it an output of
            the Function, to which autograd would attach as much as to y.
        unary: only the first argument is a tensor, and autocast does nothing to it on a CPU.
        overwrites: ``direct_backward`` may write over dy (see ``reuse.py``): where
            ``direct_forward`` set ``ctx.large``, it finds the references to dy in
            ``ctx.references``.
        prepare: checks and converts the arguments, on the way to every face but the direct one.
        stock: PyTorch's own function of the same arguments, which takes complex and nested tensors.

    The op's attributes ``apply_directly`` and ``apply_by_kernels`` are these faces themselves, for
    a caller that has asked all of what leads to them.
    """
    policies = {"cpu": autocast_cpu, "cuda": autocast_cuda}

    def decorate(definition: type) -> Callable[..., Any]:
        forward, setup_context, backward = (
            definition.forward,
            definition.setup_context,
            definition.backward,
        )  # type: ignore[attr-defined]

        def eager_forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            setup_context(ctx, args, output)
            return output[0] if keeps else output

        def open_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
            if keeps:
                ctx.mark_non_differentiable(output[1])
            opened = _Opened(ctx, "saving")
            setup_context(opened, args, output)
            opened.save()

        def open_backward(ctx: Any, *grads: Any) -> Any:
            opened = _Opened(ctx, "backward")
            return backward(opened, grads[0]) if keeps else backward(opened, *grads)

        def open_jvp(ctx: Any, *tangents: Any) -> Any:
            tangent = definition.jvp(_Opened(ctx, "forward"), *tangents)  # type: ignore[attr-defined]
            return (tangent, None) if keeps else tangent

        # where nothing wants a gradient, Dynamo counts the parameters of forward, and leaves out
        # ctx if there are as many as arguments
        eager_forward.__signature__ = inspect.Signature()  # type: ignore[attr-defined]

        members = {"__doc__": definition.__doc__, "__module__": definition.__module__}
        eager: Any = type(
            definition.__name__,
            (torch.autograd.Function,),
            {**members, "forward": staticmethod(eager_forward), "backward": staticmethod(backward)},
        )
        transformable: Any = type(
            definition.__name__,
            (torch.autograd.Function,),
            {
                **members,
                "generate_vmap_rule": True,
                "forward": staticmethod(forward),
                "setup_context": staticmethod(open_context),
                "backward": staticmethod(open_backward),
                "jvp": staticmethod(open_jvp),
            },
        )

        eager._backward_cls.save_for_forward = _nothing  # forward mode takes the other face

        # Function.apply in Python only guards against functorch, which is ruled out below: a third
        # of the overhead
        eager_apply = super(torch.autograd.Function, eager).apply  # type: ignore[misc]

        direct_forward = getattr(definition, "direct_forward", None)
        direct_backward = getattr(definition, "direct_backward", None)
        if direct_forward is not None:
            direct_value = definition.direct_value  # type: ignore[attr-defined]

            def chosen_backward(ctx: Any, dy: torch.Tensor | None) -> Any:
                if (
                    type(dy) is torch.Tensor
                    and not (
                        _grad_enabled()
                        or _tracing()
                        or modes()
                        or wrapped(dy)
                        or legacy_batched(dy)
                    )
                    and forward_ad._current_level < 0
                    and selection._forced in BY_ATEN
                    and (unary or not autocast_active())
                ):
                    if overwrites and ctx.large:
                        # here, where the engine calls: what a call from Python adds depends on who
                        # evaluates frames (Dynamo sets that)
                        ctx.references = getrefcount(dy)
                    return direct_backward(ctx, dy)  # type: ignore[misc]
                return backward(ctx, dy)

            faces = {
                "forward": staticmethod(direct_forward),
                "backward": staticmethod(chosen_backward if direct_backward else backward),
            }
            direct: Any = type(
                definition.__name__, (torch.autograd.Function,), {**members, **faces}
            )
            direct._backward_cls.save_for_forward = _nothing
            direct._backward_cls.apply = faces[
                "backward"
            ].__func__  # as Function's own apply does, one Python call sooner
            direct_apply = super(torch.autograd.Function, direct).apply  # type: ignore[misc]

        kernel_forward = getattr(definition, "kernel_forward", None)
        if kernel_forward is not None:
            kernel_value, kernel_backward = definition.kernel_value, definition.kernel_backward  # type: ignore[attr-defined]

            def backward_by_kernels(ctx: Any, dy: torch.Tensor | None) -> Any:
                if (
                    type(dy) is torch.Tensor
                    and not (
                        _grad_enabled()
                        or _tracing()
                        or modes()
                        or autocast_active()
                        or wrapped(dy)
                        or legacy_batched(dy)
                    )
                    and forward_ad._current_level < 0
                    and takes_kernels(dy)
                ):
                    return kernel_backward(ctx, dy)
                return backward(ctx, dy)

            faces = {
                "forward": staticmethod(kernel_forward),
                "backward": staticmethod(backward_by_kernels),
            }
            by_kernels: Any = type(
                definition.__name__, (torch.autograd.Function,), {**members, **faces}
            )
            by_kernels._backward_cls.save_for_forward = _nothing
            by_kernels._backward_cls.apply = backward_by_kernels
            apply_by_kernels = super(torch.autograd.Function, by_kernels).apply  # type: ignore[misc]

        def call(*args: Any) -> Any:
            if stock is not None and is_stocks(args[0]):
                return stock(*args)
            if type(args[0]) not in TENSORS and has_torch_function(args):
                return handle_torch_function(op, args, *args)
            if prepare is not None:
                args = prepare(*args)
            if torch.compiler.is_compiling():
                args = _cast(args, policies)
                if not functorch_active():
                    return eager.apply(*args)
                return (
                    forward(*args)[0] if keeps else forward(*args)
                )  # whose primitives are differentiated by their formulas
            if autocast_active():
                args = _cast(args, policies)
            if functorch_active() or forward_ad._current_level >= 0:
                if _is_beyond_a_function(unary):
                    return forward(*args)[0] if keeps else forward(*args)
                return transformable.apply(*args)[0] if keeps else transformable.apply(*args)
            if torch.is_grad_enabled():
                for a in args:
                    if isinstance(a, torch.Tensor) and a.requires_grad:
                        return eager_apply(*args)
            return forward(*args)[0] if keeps else forward(*args)

        def call_unary(x: Any, *parameters: Any) -> Any:
            if (
                type(x) in TENSORS
                and not (_tracing() or functorch_active() or modes())
                and forward_ad._current_level < 0
                and x.is_floating_point()
                and not x.is_nested
            ):
                if x.is_cpu and selection._forced in BY_ATEN:
                    return (
                        direct_apply(x, *parameters)
                        if x.requires_grad
                        else direct_value(x, *parameters)
                    )
                if kernel_forward is not None and takes_kernels(x) and not autocast_active():
                    return (
                        apply_by_kernels if x.requires_grad and _grad_enabled() else kernel_value
                    )(x, *parameters)
            return call(x, *parameters)

        def call_any(*args: Any) -> Any:
            x = args[0]
            if (
                type(x) in TENSORS
                and not (_tracing() or functorch_active() or modes() or autocast_active())
                and forward_ad._current_level < 0
                and PLAIN.issuperset(map(type, args))
                and x.is_floating_point()
                and not x.is_nested
            ):
                if x.is_cpu and selection._forced in BY_ATEN:
                    apply, value = direct_apply, direct_value
                elif kernel_forward is not None and takes_kernels(x):
                    apply, value = apply_by_kernels, kernel_value
                else:
                    return call(*args)
                if _grad_enabled():
                    for a in args:
                        if type(a) in TENSORS and a.requires_grad:
                            return apply(*args)
                return value(*args)
            return call(*args)

        op: Any = call if direct_forward is None else call_unary if unary else call_any
        op.__name__ = op.__qualname__ = definition.__name__
        op.__doc__ = definition.__doc__
        op.apply_directly = direct_apply if direct_forward is not None else None
        op.apply_by_kernels = apply_by_kernels if kernel_forward is not None else None
        return op

    return decorate


class _Opened:
    """The context of the transformable face. functorch keeps one list of batch dimensions for what
    is saved for backward and for forward
    mode, and knows no None in it: so all of both is saved as one list, and each finds its own in
    there."""

    def __init__(self, ctx: Any, use: str) -> None:
        vars(self).update(ctx=ctx, use=use, kept={"backward": (), "forward": ()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.kept["backward"] = tensors

    def save_for_forward(self, *tensors: torch.Tensor | None) -> None:
        self.kept["forward"] = tensors

    def save(self) -> None:
        every = {id(t): t for tensors in self.kept.values() for t in tensors if t is not None}
        place = {key: i for i, key in enumerate(every)}
        self.ctx.places = {
            use: [None if t is None else place[id(t)] for t in tensors]
            for use, tensors in self.kept.items()
        }
        self.ctx.save_for_backward(*every.values())
        self.ctx.save_for_forward(*every.values())

    @property
    def saved_tensors(self) -> tuple[torch.Tensor | None, ...]:
        saved = self.ctx.saved_tensors
        return tuple([None if i is None else saved[i] for i in self.ctx.places[self.use]])


def is_stocks(x: Any) -> bool:
    """Whether no formula of ours is written for such a tensor: complex numbers, and rows of several
    lengths (which no Function bears)."""
    return isinstance(x, torch.Tensor) and (x.is_nested or x.is_complex())


def differentiated() -> bool:
    """Whether what backward computes may be differentiated: it is asked to make a graph, or forward
    mode runs over it."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def wanted(
    needs: Sequence[bool], grads: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients, None for one that nobody needs (a primitive returns an empty tensor there)."""
    return tuple([g if need else None for g, need in zip(grads, needs, strict=True)])


def _is_beyond_a_function(unary: bool) -> bool:
    """Whether torch.func's transformations around this call would go wrong with a Function, and
    need the primitives' formulas.

    Forward mode inside forward mode takes the tangents of a Function's jvp for constants. Forward
    mode over vmap bears no output without a tangent, and no argument that is a tuple.
    """
    levels = [level.key() for level in get_interpreter_stack() or ()]
    forward = levels.count(TransformType.Jvp)
    return forward > 1 or (
        forward == 1
        and not unary
        and TransformType.Vmap in levels[levels.index(TransformType.Jvp) :]
    )


def _nothing(ctx: Any, *tensors: torch.Tensor | None) -> None:
    pass


def _cast(args: tuple[Any, ...], policies: dict[str, str | None]) -> tuple[Any, ...]:
    """What autocast does to the inputs of torch's own operator. The primitives under it then ignore
    autocast (``backends/library.py``)."""
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    policy = policies.get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return args
    target = torch.get_autocast_dtype(device) if policy == "lower" else torch.float32
    return tuple(a.to(target) if _eligible(a, target) else a for a in args)


def _eligible(a: Any, target: torch.dtype) -> bool:
    return (
        isinstance(a, torch.Tensor)
        and a.is_floating_point()
        and a.dtype not in (target, torch.float64)
    )
