"""Logits that are not computed until somebody asks for them.

A language model's head gives a logit for each token and each word: the largest tensor of a training
step, of which the loss wants one number a token. Under ``patch(model)`` the head returns a
:class:`Deferred` instead, which has the shape, dtype, device and place in autograd's graph of the
logits, and the head's input and weight in place of their numbers. Views of its rows and casts give
another one. ``torch.nn.functional.cross_entropy`` of it is
:func:`custom_backprop.functional.linear_cross_entropy`. Everything else makes the logits, by
stock's own functions, and goes on with them.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from .. import functional
from ..backends.selection import TENSORS, are_saved_tensors_hooked, is_traced, is_transformed
from ..functional.arguments import reduction_of

_has_autocast = torch.amp.is_autocast_available
_NONE = contextlib.nullcontext()

#: with fewer logits, of 4 MiB in float32, a fused loss takes longer on a CPU
LEAST = 2**20

_ADVICE = (
    "ask for them before, as by logits.detach(), or call custom_backprop.convert(model, "
    "functions=False)"
)


@dataclass(eq=False)
class _Product:
    """What the logits of one call of a head are made of, and the autocast that they are made
    under: the dtype, or None."""

    weight: Tensor
    bias: Tensor | None
    autocast: torch.dtype | None
    #: whether a loss was computed of them that never made them
    is_fused: bool = False

    def __post_init__(self) -> None:
        _watch_optimizers(1)
        weakref.finalize(self, _watch_optimizers, -1)

    def context(self) -> Any:
        """The autocast of the call."""
        device, dtype = self.weight.device.type, self.autocast
        return torch.autocast(device, dtype, dtype is not None) if _has_autocast(device) else _NONE

    def of(self, x: Tensor) -> Tensor:
        with self.context():
            return linear(x, self.weight, self.bias)


#: reentrant, because the collector may find a product while another is made
_lock = threading.RLock()
_products, _hook = 0, None


def _watch_optimizers(change: int) -> None:
    """One product more or less whose weight must not change unnoticed. Torch's fused optimizers,
    and ours that are made of them, leave the versions of parameters as they are."""
    global _products, _hook
    with _lock:
        _products += change
        if _products and _hook is None:
            _hook = register_optimizer_step_post_hook(_have_stepped)
        elif not _products and _hook is not None:
            _hook.remove()
            _hook = None


def _have_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


class _Node(torch.autograd.Function):
    """Connects a :class:`Deferred` with the graph. Only what looks below torch's functions sends a
    gradient here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.product, *_, ctx.cap = given
        return Deferred(x, *given)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        tensors: Any = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        x, weight, bias = tensors[0], tensors[1], tensors[2]
        with torch.enable_grad():
            y = _Product(weight, bias, ctx.product.autocast).of(x)
            if ctx.cap is not None:
                name, cap = ctx.cap
                y = y / cap if name == "div" else torch.tanh(y / cap)
                y = y * cap if name == "mul" else y
        found = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype)))
        return *(None if t is None else next(found) for t in tensors), *[None] * 5


class Deferred(Tensor):
    """The logits x Wᵀ + b without their numbers: a tensor without storage.

    Attributes:
        x: the input of the head, (..., H) for logits of shape (..., C).
        product: the rest of what they are made of.
        shadow: a tensor on the meta device, which gives shape, strides and errors of each step.
        step: the logits that these are a view or a cast of, and the function that makes them.
        cap: how far ``tanh(logits / cap) * cap`` has come: "div", "tanh", "mul", and the number.
        made: the logits themselves, once somebody has asked for them.
        hooks: of FSDP, for their gradient.
    """

    x: Tensor
    product: _Product
    shadow: Tensor
    step: tuple[Deferred, Callable[[Tensor], Tensor]] | None
    cap: tuple[str, float] | None
    made: Tensor | None
    hooks: list[Callable[[Tensor], Any]]
    _changes: int
    _changes_before: int
    _before: tuple[Any, ...]

    @staticmethod
    def __new__(
        cls, x: Tensor, product: _Product, shadow: Tensor, step: Any = None, cap: Any = None
    ) -> Deferred:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shadow.shape, shadow.stride(), dtype=shadow.dtype, device=x.device
        )
        self.x, self.product, self.shadow, self.step, self.cap = x, product, shadow, step, cap
        self.made, self.hooks, self._changes = None, [], 0
        self._before = _state(x), _state(product.weight), _state(product.bias)
        self._changes_before = step[0].changes() if step else 0
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # under a function mode, such as torch.device, stock's function calls itself by its name,
        # which is that of its wrapper in patch.py
        answer = _STAYS_DEFERRED.get(func) or _STAYS_DEFERRED.get(getattr(func, "__wrapped__", ""))
        if answer is not None and not is_traced() and not is_transformed():
            found = answer(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(Deferred, Deferred.logits, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd."""
        args, kwargs = tree_map_only(Deferred, lambda d: d.logits().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def logits(self) -> Tensor:
        """The tensor that stock's head would have returned.

        Raises:
            RuntimeError: what they are made of has changed since.
        """
        if self.made is None:
            with torch.inference_mode(False), torch.enable_grad():
                if self.step is None:
                    self.check()
                    self.made = self.product.of(self.x)
                else:
                    of, function = self.step
                    values = of.logits()
                    if of.changes() != self._changes_before:
                        raise RuntimeError(
                            "deferred logits were changed in place after a view or a copy of them "
                            f"was made, of shape {tuple(self.shadow.shape)}: {_ADVICE}"
                        )
                    self.made = function(values)
                for hook in self.hooks:
                    self.made.register_hook(hook)
            self._changes = self.made._version
        return self.made

    def is_made(self) -> bool:
        """Whether the logits, or those that these are a view of, have been computed."""
        return self.made is not None or (self.step is not None and self.step[0].is_made())

    def changes(self) -> int:
        """How often the logits were changed in place."""
        return 0 if self.made is None else self.made._version - self._changes

    def check(self) -> None:
        """Raises RuntimeError if the head's input, weight or bias have changed."""
        given = {"input": self.x, "weight": self.product.weight, "bias": self.product.bias}
        for (name, t), before in zip(given.items(), self._before, strict=True):
            if _state(t) != before:
                raise RuntimeError(
                    f"deferred logits of shape {tuple(self.shadow.shape)} were asked for after the "
                    f"{name} of their head had changed, as by an optimizer's step: {_ADVICE}"
                )


def unless_fused(output: Any) -> Any:
    """What a model returns, with the logits made of which no loss was."""
    return tree_map_only(Deferred, lambda d: d if d.product.is_fused else d.logits(), output)


def _state(t: Tensor | None) -> Any:
    return None if t is None else (t._version, t.data_ptr())


def of_head(head: torch.nn.Linear, x: Any) -> Deferred | None:
    """The deferred logits of a linear layer; None where it is to compute them.

    That is: without a gradient; where a compiler, a tracer, a transformation or hooks look on;
    where a tensor is a subclass (a DTensor) or on the meta device; and where there are too few.
    """
    weight, bias = head.weight, head.bias
    given = (x, weight) if bias is None else (x, weight, bias)
    if is_traced() or is_transformed() or not torch.is_grad_enabled():
        return None
    if not TENSORS.issuperset(map(type, given)) or not any(t.requires_grad for t in given):
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks:
        return None
    if head._backward_pre_hooks or _has_any_global_hook() or are_saved_tensors_hooked():
        return None
    if not x.dim() or x.shape[-1] != weight.shape[-1] or not x.is_floating_point() or x.is_nested:
        return None
    if x.is_meta or any(t.device != x.device or t.is_inference() for t in given):
        return None
    shape = (*x.shape[:-1], weight.shape[0])
    if math.prod(shape) < LEAST:
        return None
    device, dtype, autocast = x.device.type, x.dtype, None
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        if any(t.dtype == torch.float64 for t in given):
            return None
        dtype = autocast = torch.get_autocast_dtype(device)
    elif any(t.dtype != dtype for t in given):
        return None
    product = _Product(weight, bias, autocast)
    return _node(x, product, torch.empty(shape, dtype=dtype, device="meta"), None, None)


def _next(of: Deferred, function: Any, x: Tensor, shadow: Tensor, cap: Any) -> Any:
    """What ``function`` makes of deferred logits."""
    of.check()
    return _node(x, of.product, shadow, (of, function), cap)


def _node(x: Tensor, product: _Product, *given: Any) -> Any:
    return _Node.apply(x, product.weight, product.bias, product, *given)


def _stepped(func: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A view of the rows, or a cast."""
    if not isinstance(self, Deferred) or self.is_made() or not torch.is_grad_enabled():
        return NotImplemented
    if func is Tensor.to:
        try:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        except TypeError:  # another tensor, copy
            return NotImplemented
        if memory_format is not None or (device or self.device) != self.device:
            return NotImplemented
        args, kwargs = (dtype or self.dtype,), {}
    if func is Tensor.__getitem__ and not _is_of_rows(self.shadow.dim(), *args):
        return NotImplemented
    shadow = func(self.shadow, *args, **kwargs)
    if shadow is self.shadow:
        return self
    if not shadow.is_floating_point() or not shadow.dim() or shadow.shape[-1] != self.shape[-1]:
        return NotImplemented
    rows = self.x[args[0]] if func is Tensor.__getitem__ else self.x
    rows = rows.reshape(*shadow.shape[:-1], self.x.shape[-1])
    return _next(self, lambda logits: func(logits, *args, **kwargs), rows, shadow, self.cap)


def _is_of_rows(dim: int, index: Any) -> bool:
    """Whether an index of logits with ``dim`` dimensions takes whole rows, by ints and slices."""
    given = index if isinstance(index, tuple) else (index,)
    if not all(type(i) in (int, slice) or i is ... for i in given):
        return False
    of_last = ... in given or len(given) == dim
    return not of_last or given[-1] is ... or given[-1] == slice(None)


def _capped(func: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A step of tanh(logits / cap) * cap."""
    if not isinstance(self, Deferred) or self.is_made() or not torch.is_grad_enabled() or kwargs:
        return NotImplemented
    before, cap = self.cap or (None, 0.0)
    name, number = func.__name__, cap if func.__name__ == "tanh" else args[0]
    if (before, name) not in ((None, "div"), ("div", "tanh"), ("tanh", "mul")):
        return NotImplemented
    if type(number) not in (int, float) or number <= 0 or (name == "mul" and number != cap):
        return NotImplemented
    shadow = func(self.shadow, *args)
    return _next(self, lambda logits: func(logits, *args), self.x, shadow, (name, number))


def _loss(
    func: Any,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Cross-entropy of rows and classes."""
    if not isinstance(input, Deferred) or input.is_made() or not torch.is_grad_enabled():
        return NotImplemented
    x, product = input.x, input.product
    if type(target) not in TENSORS or (input.cap and input.cap[0] != "mul"):
        return NotImplemented
    if input.dim() != 2 or target.shape != x.shape[:1] or target.device != x.device:
        return NotImplemented
    if weight is not None and (weight.dtype != x.dtype or input.dtype != x.dtype):
        return NotImplemented
    input.check()
    device, dtype = x.device.type, input.dtype
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        dtype = torch.promote_types(dtype, torch.float32)
    product.is_fused = True
    with product.context():
        return functional.linear_cross_entropy(
            x, product.weight, target, product.bias,
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction_of(size_average, reduce, reduction),
            softcap=input.cap[1] if input.cap else None, dtype=dtype,
        )  # fmt: skip


def _observed(func: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Who wants the gradient of logits that a loss did without would wait in vain. FSDP does not:
    it listens to every output, and the loss is one. Should somebody make the logits all the same,
    it hears of their gradient, too."""
    if isinstance(self, Deferred) and self.product.is_fused:
        if args and getattr(args[0], "__module__", "").startswith("torch.distributed."):
            if self.is_made():
                return NotImplemented
            self.hooks.append(args[0])
            with torch._C.DisableTorchFunctionSubclass():
                return func(self, *args, **kwargs)
        raise RuntimeError(
            f"{func.__name__}: the loss was computed without these logits of shape "
            f"{tuple(self.shadow.shape)}, so that they will have no gradient: call the model "
            "without its labels, or custom_backprop.convert(model, functions=False)"
        )
    return NotImplemented


_STAYS_DEFERRED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((cross_entropy, functional.cross_entropy), _loss),
    **dict.fromkeys(
        (Tensor.div, torch.div, Tensor.tanh, torch.tanh, Tensor.mul, torch.mul), _capped
    ),
    **dict.fromkeys(
        (Tensor.retain_grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
        _observed,
    ),
    **dict.fromkeys(
        (
            Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.view,
            Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.__getitem__, torch.reshape,
            torch.flatten,
        ),
        _stepped,
    ),
}  # fmt: skip

#: what can be said without the numbers
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "_base", "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta",
            "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu", "layout", "ndim",
            "requires_grad", "shape",
        )
    ),
    *(
        getattr(Tensor, name)
        for name in (
            "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
            "is_floating_point", "is_inference", "nelement", "numel", "size", "stride",
        )
    ),
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}  # fmt: skip
