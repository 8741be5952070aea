"""The calls of a model's modules, recorded with their inputs and the gradients of their outputs, so
that each can be run again alone, by another module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .case import is_float

#: tensors by what they are called
Named = dict[str, Tensor]
Loss = Callable[[Any], Tensor]


@dataclass
class Call:
    """One call of a module of a model."""

    name: str
    """the module's, empty for the model itself"""
    loss: Loss | None
    arguments: tuple[Any, Any]
    buffers: Named
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """those that arrived, by the position of the floating-point tensor in the output"""

    def run(
        self, module: nn.Module, dtype: torch.dtype, seed: int = 0, shake: bool = False
    ) -> tuple[Named, Named]:
        """Calls ``module``, which is in ``dtype``, in the same way; with ``shake``, with everything
        changed in its last place.

        Returns:
            the results: outputs and buffers; and the gradients of inputs and parameters, if any
            gradient arrived.
        """
        copies = _Copies(dtype, shake)
        args, kwargs = copies.of(self.arguments)
        buffers = {n: b for n, b in module.named_buffers() if n in self.buffers}
        for n, b in buffers.items():
            b.copy_(self.buffers[n])
        torch.manual_seed(seed)
        output = module(*args, **kwargs)
        outputs = _tensors(output)
        results = _numbered("output", outputs)
        results |= {f"buffer {n}": b.clone() for n, b in buffers.items() if is_float(b)}
        leaves = _numbered("input", copies.leaves) | dict(module.named_parameters())
        leaves = {n: x for n, x in leaves.items() if x.requires_grad}
        if self.name:
            given = {i: dy.to(dtype) for i, dy in self.gradients.items()}
            given = {i: shaken(dy) if shake else dy for i, dy in given.items()}
            pairs = [
                (y, given[i])
                for i, y in enumerate(outputs)
                if i in given and y.requires_grad and y.shape == given[i].shape
            ]
        else:
            pairs = _weighted(output, self.loss)
        if not pairs or not leaves:
            return results, {}
        ys, dys = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(
            ys, list(leaves.values()), dys, allow_unused=True, materialize_grads=True
        )
        return results, dict(zip(leaves, gradients, strict=True))


def calls_of(model: nn.Module, batch: Any, dtype: torch.dtype, loss: Loss | None) -> list[Call]:
    """Runs ``model`` forward and backward. Returns the calls of its modules, in the order in which
    they end."""
    started: list[Call] = []
    ended: list[Call] = []

    def start(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        started.append(Call(name, loss, _Copies(dtype).of((args, kwargs)), buffers))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        call = started.pop()
        ended.append(call)
        for i, y in enumerate(_tensors(output)):
            if y.requires_grad:
                y.register_hook(partial(call.gradients.__setitem__, i))

    handles = []
    for name, module in model.named_modules():
        before = partial(start, name)
        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(end))
    torch.manual_seed(0)
    batch = _Copies(dtype).of(dict(batch) if isinstance(batch, Mapping) else batch)
    if isinstance(batch, dict):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    for handle in handles:
        handle.remove()
    if pairs := _weighted(output, loss):
        ys, dys = zip(*pairs, strict=True)
        torch.autograd.backward(ys, dys)
    return ended


def shaken(x: Tensor) -> Tensor:
    """``x``, changed in its last place."""
    return x * (1 + torch.finfo(x.dtype).eps * (2 * torch.rand_like(x) - 1))


def _weighted(output: Any, loss: Loss | None) -> list[tuple[Tensor, Tensor]]:
    """What is differentiated of the output of a model, and the gradients from which that starts."""
    read = output.get if isinstance(output, Mapping) else partial(getattr, output)
    value = loss(output) if loss is not None else read("loss", None)
    if value is not None:
        return [(value, torch.ones_like(value))]
    drawn = torch.Generator().manual_seed(0)
    return [
        (y, torch.randn(y.shape, generator=drawn, dtype=y.dtype).to(y.device))
        for y in _tensors(output)
        if y.requires_grad
    ]


class _Copies(TorchFunctionMode):
    """Copies arguments or results, whatever objects hold them. The floating-point tensors in the
    copy are in ``dtype`` and cut off the graph. ``found`` are those that were copied, ``leaves``
    what autograd computes the copies from."""

    def __init__(self, dtype: torch.dtype, shake: bool = False) -> None:
        super().__init__()
        self.dtype, self.shake = dtype, shake
        self.found: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def of(self, something: Any) -> Any:
        # a Parameter copies itself without asking a mode
        parameters = (p for p in tree_leaves(something) if isinstance(p, nn.Parameter))
        memo = {id(p): self._copy(p) for p in parameters}
        with self:
            return copy.deepcopy(something, memo)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            return self._copy(args[0])
        return function(*args, **(kwargs or {}))

    def _copy(self, x: Tensor) -> Tensor:
        if not is_float(x):
            return x.detach().clone()
        leaf = x.detach().to(self.dtype, copy=True)
        leaf = (shaken(leaf) if self.shake else leaf).requires_grad_(x.requires_grad)
        self.found.append(x)
        self.leaves.append(leaf)
        return leaf.clone()  # a module may change its argument in place


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output."""
    copies = _Copies(torch.float64)
    copies.of(output)
    return copies.found


def _numbered(word: str, tensors: list[Tensor]) -> Named:
    return {f"{word} {i}" if i else word: x for i, x in enumerate(tensors)}
