"""Which layer is at work, in forward and in backward."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .report import LOSS, MODEL, OUTSIDE, Layer

#: of torch.nn.Module.__call__
_lock = threading.RLock()


class Where:
    """Which layer is at work.

    In forward ``torch.nn.Module.__call__`` says, which is rewritten meanwhile, as ``torch.fx``
    does: whoever asks whether a layer has hooks sees none. A node of the graph draws a number when
    forward makes it, so the number of the node that backward is at says whose forward made it; also
    where a tensor is used twice or needs no gradient.
    """

    def __init__(self, model: nn.Module, loss: Any) -> None:
        self.layers: dict[str, Layer] = {}
        self._called: dict[nn.Module, str] = {}
        self._owner: dict[int, str] = {}
        self._stack = [OUTSIDE]
        self._starts, self._names = [0], [OUTSIDE]  # from this number of a node on, this layer
        seen: set[nn.Module] = set()
        named = [(name or MODEL, module) for name, module in model.named_modules(seen)]
        named += loss.named_modules(seen, LOSS) if isinstance(loss, nn.Module) else []
        for name, module in named:
            layer = self.layers[name] = Layer(name, type(module).__name__)
            for p in module.parameters(recurse=False):
                layer.parameters += 0 if id(p) in self._owner else p.numel()
                self._owner.setdefault(id(p), name)
            self._called[module] = name
        self.layers[OUTSIDE] = Layer(OUTSIDE)

    @contextmanager
    def hears(self) -> Iterator[None]:
        """In this block it is told of the calls of layers."""
        with _lock:
            its = nn.Module.__call__

            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if module not in self._called:
                    return its(module, *args, **kwargs)
                with self.at(self._called[module]):
                    return its(module, *args, **kwargs)

            nn.Module.__call__ = call  # type: ignore[method-assign]
            try:
                yield
            finally:
                nn.Module.__call__ = its  # type: ignore[method-assign]

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """A call of the layer of that name. It ends even if it raises: a checkpoint stops its
        second forward so."""
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        # in backward a checkpoint computes again, maybe on a thread with numbers of its own
        if not self.in_backward():
            self._starts.append(torch.autograd._get_sequence_nr())
            self._names.append(self._stack[-1])

    @staticmethod
    def in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def layer(self) -> Layer:
        node = torch._C._current_autograd_node()
        if node is None or len(self._stack) > 1:
            name = self._stack[-1]
        elif hasattr(node, "variable"):  # the gradient arrives at a leaf
            name = self._owner.get(id(node.variable), OUTSIDE)
        else:
            name = self._names[bisect_right(self._starts, node._sequence_nr()) - 1]
        return self.layers[name]
