"""One call under test: the tensors that are differentiated, and the same call with another dtype,
layout or set of leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backends.selection import is_batched, is_wrapped


def is_float(a: Any) -> bool:
    """Whether ``a`` is a floating-point tensor."""
    return isinstance(a, Tensor) and a.is_floating_point()


@dataclass(frozen=True)
class Case:
    """``function(*args, **kwargs)``, differentiated with respect to the positional tensors that
    require grad. The other fields are arguments of :func:`~custom_backprop.testing.validate`."""

    function: Callable[..., Any]
    reference: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    double_backward: bool = True
    low_precision: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    inductor: bool = False
    elementwise: bool = False
    rows: tuple[int, ...] = ()
    isolated: bool = False
    """each call gets copies, because the function overwrites what it gets"""
    refuses_float64: str = ""
    """why the case is one of float32; empty for a function that computes in float64"""

    @property
    def exact(self) -> bool:
        """Whether it runs in float64."""
        return not self.refuses_float64

    @property
    def wanted(self) -> tuple[int, ...]:
        """Positions of the arguments that are differentiated."""
        return tuple(i for i, a in enumerate(self.args) if is_float(a) and a.requires_grad)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those arguments, as fresh leaves that require grad."""
        return tuple(self.args[i].detach().clone().requires_grad_() for i in self.wanted)

    @property
    def device(self) -> torch.device:
        return next((a.device for a in self.args if isinstance(a, Tensor)), torch.device("cpu"))

    def call(self, *leaves: Tensor) -> Any:
        """Ours, as a function of the leaves alone."""
        args, kwargs = self._fill(leaves), self.kwargs
        if not self.isolated:
            return self.function(*args, **kwargs)
        args, kwargs = [*map(_copied, args)], {k: _copied(a) for k, a in kwargs.items()}
        return tree_map_only(Tensor, _copied, self.function(*args, **kwargs))

    def call_reference(self, *leaves: Tensor) -> Any:
        """The reference, as a function of the leaves alone."""
        assert self.reference is not None
        return self.reference(*self._fill(leaves), **self.kwargs)

    def _fill(self, leaves: Sequence[Tensor]) -> list[Any]:
        args = [a.detach() if isinstance(a, Tensor) else a for a in self.args]
        for i, leaf in zip(self.wanted, leaves, strict=True):
            args[i] = leaf
        return args

    def overwritten(self) -> str:
        """Which tensor a call, or its backward, writes that belongs to the caller; empty if none.
        Without isolation."""
        case = replace(self, isolated=False)
        leaves = case.leaves
        dys = weights_for(outputs(replace(self, isolated=True).call(*leaves)))
        given = [*case._fill(leaves), *case.kwargs.values()]
        named = [(f"argument {i}", a) for i, a in enumerate(given) if isinstance(a, Tensor)]
        named += [(f"the gradient of output {i}", dy) for i, dy in enumerate(dys)]
        before = [(t.detach().clone(), t._version) for _, t in named]
        results = outputs(case.call(*leaves))
        if any(r.requires_grad for r in results):
            torch.autograd.grad(results, leaves, dys, allow_unused=True)
        for (name, t), (copy_, version) in zip(named, before, strict=True):
            if not same_bits(t, copy_) or t._version != version:
                return f"{name}, of shape {tuple(t.shape)}, was written"
        return ""

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with every floating-point tensor rounded to ``dtype``."""

        def cast(a: Any) -> Any:
            return a.detach().to(dtype).requires_grad_(a.requires_grad) if is_float(a) else a

        return replace(
            self,
            args=tuple(map(cast, self.args)),
            kwargs={k: cast(v) for k, v in self.kwargs.items()},
        )

    def at(self, x: Tensor) -> Case:
        """The same case with ``x`` instead of its only differentiated tensor."""
        (i,) = self.wanted
        return replace(self, args=(*self.args[:i], x.requires_grad_(), *self.args[i + 1 :]))

    def nudged(self, seed: int) -> Case:
        """The same case with every floating-point number up to a sixteenth nearer to 0.
        Probabilities and variances stay valid."""
        generator = torch.Generator().manual_seed(seed)

        def nudge(a: Any) -> Any:
            if not is_float(a):
                return a
            factor = (
                1 - torch.rand(a.shape, generator=generator, dtype=torch.float64).to(a.device) / 16
            )
            return (a.detach().double() * factor).to(a.dtype).requires_grad_(a.requires_grad)

        return replace(
            self,
            args=tuple(map(nudge, self.args)),
            kwargs={k: nudge(v) for k, v in self.kwargs.items()},
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


class _Copy(torch.autograd.Function):
    """The identity, as a copy with the same strides; so is its backward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if is_batched(x) or is_wrapped(x):  # cannot be written in place
            return x.clone()
        once = x
        for dim, stride in enumerate(x.stride()):
            if stride == 0 and x.shape[dim] > 1:
                once = once.narrow(dim, 0, 1)
        fresh = torch.empty_strided(once.size(), once.stride(), dtype=x.dtype, device=x.device)
        fresh.copy_(once)
        return fresh if once is x else fresh.expand_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Backward needs nothing."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _copied(dy)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor) -> Tensor:
        return _copied(tx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return _copied(x), in_dims[0]


def _copied(a: Any) -> Any:
    """A differentiable copy of a tensor; another object as it is."""
    return _Copy.apply(a) if isinstance(a, Tensor) else a


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The differentiable outputs of a call, in tuples, lists and dicts of any depth.

    Raises:
        TypeError: there is none.
    """
    found = tuple(r for r in tree_leaves(result) if isinstance(r, Tensor) and r.is_floating_point())
    if not found:
        raise TypeError(f"no output is a floating-point tensor: got {type(result).__name__}")
    return found


def weights_for(results: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Random gradients for the outputs: a plain sum would hide a wrong gradient (for a softmax it
    is zero)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.empty_like(r)
        if r.is_meta
        else torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device, r.dtype)
        for r in results
    )


def gradients(
    function: Callable[..., Any],
    leaves: Sequence[Tensor],
    dys: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """(outputs, gradients of the leaves) for given or random gradients of the outputs."""
    results = outputs(function(*leaves))
    dys = weights_for(results) if dys is None else dys
    return results, torch.autograd.grad(results, leaves, dys, allow_unused=True, **options)


def of_module(
    module: nn.Module, reference: Any, inputs: Sequence[Any]
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """(function, reference, args) of a module: its parameters and floating-point buffers become
    arguments after the inputs."""
    state = dict(module.named_parameters()) | {
        k: b for k, b in module.named_buffers() if b.is_floating_point()
    }
    count, names = len(inputs), list(state)

    def functional(of: nn.Module) -> Callable[..., Any]:
        of = copy.deepcopy(of)
        return lambda *args, **kwargs: torch.func.functional_call(
            of, dict(zip(names, args[count:], strict=True)), args[:count], kwargs
        )

    args = tuple(inputs) + tuple(t.detach().requires_grad_(t.requires_grad) for t in state.values())
    return (
        functional(module),
        functional(reference) if isinstance(reference, nn.Module) else reference,
        args,
    )
