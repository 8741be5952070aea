"""What backpropagation costs, layer by layer, with stock's layers and with ours: flops, bytes
moved, bytes saved for backward.

``flops`` counts products (matrices, convolutions, attention), a multiplication and an addition as
two, by the formulas of ``torch.utils.flop_counter`` and those of our primitives. ``bytes`` counts
what the operators read and write: each argument and each result once, a view not at all. Where a
Triton kernel runs our operator, that is one operator; where ATen runs it, the calls beneath it
count. ``saved`` counts what autograd saves between forward and backward: each storage once, whole,
in the layer that saves it first. Parameters and buffers do not count, since they stay anyway.

A dispatch mode sees flops and bytes; it makes our ops call the dispatcher's operators. What is
saved is seen without a mode, and the calls of layers without hooks: the model does what it does in
training.
"""

from __future__ import annotations

import copy
import json
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from . import functional
from .backends.library import OPERATORS
from .backends.selection import backend_for, watch_saved
from .conversions.convert import convert, revert
from .conversions.deferred import Deferred

__all__ = ["Cost", "CostReport", "Layer", "cost", "measure"]

#: what a layer costs, and the heading of its columns
FIGURES = {
    "forward_flops": "flops forward",
    "backward_flops": "flops backward",
    "forward_bytes": "bytes forward",
    "backward_bytes": "bytes backward",
    "saved_bytes": "bytes saved",
}
LEGEND = (
    "flops: of products; bytes: read and written by the operators; saved: for backward, each "
    "storage once, without parameters"
)
MODEL, LOSS, OUTSIDE = "(model)", "(loss)", "(outside)"


@dataclass
class Layer:
    """One module's own cost, without that of the modules in it. ``kind`` is its class."""

    name: str
    kind: str = ""
    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    saved_bytes: int = 0

    def costs(self) -> bool:
        """Whether it has a figure at all: containers and what is never called have none."""
        return any(getattr(self, f) for f in ("parameters", *FIGURES))


@dataclass
class Cost:
    """The cost of one forward and one backward."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def total(self) -> Layer:
        sums = {
            f: sum(getattr(layer, f) for layer in self.layers) for f in ("parameters", *FIGURES)
        }
        return Layer("total", **sums)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers], "total": asdict(self.total)}


@dataclass
class CostReport:
    """What :func:`cost` found. Prints as a table."""

    name: str
    device: str
    stock: Cost
    ours: Cost

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "device": self.device,
            "stock": self.stock.to_dict(),
            "ours": self.ours.to_dict(),
        }

    def to_json(self, **options: Any) -> str:
        return json.dumps(self.to_dict(), **options)

    def __str__(self) -> str:
        pairs = [
            pair
            for pair in zip(self.stock.layers, self.ours.layers, strict=True)
            if any(layer.costs() for layer in pair)
        ]
        pairs.append((self.stock.total, self.ours.total))
        name, kind = (max(len(getattr(stock, of)) for stock, _ in pairs) for of in ("name", "kind"))
        start = f"{{:<{max(name, 5)}}}  {{:<{max(kind, 4)}}}  {{:>10}}"
        lines = [f"{self.name} on {self.device}"]
        lines.append(
            start.format("", "", "") + "".join(f"{title:>18}" for title in FIGURES.values())
        )
        lines.append(
            start.format("layer", "kind", "parameters") + f"{'stock':>11}{'ours':>7}" * len(FIGURES)
        )
        for stock, ours in pairs:
            figures = "".join(
                f"{_short(getattr(stock, f)):>11}{_short(getattr(ours, f)):>7}" for f in FIGURES
            )
            lines.append(start.format(stock.name, stock.kind, _short(stock.parameters)) + figures)
        return "\n".join([*lines, LEGEND])


def cost(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    targets: Sequence[Any] = (),
    name: str | None = None,
) -> CostReport:
    """The cost of ``model`` with torch's layers and with ours: what :func:`custom_backprop.revert`
    and :func:`custom_backprop.convert` make of a copy. The model itself is left as it is. Without
    fusions, which count for the block around them: each layer is to have figures of its own.

    Args:
        model, inputs, loss, targets: as in :func:`measure`.
        name: the report's title. Default: the model's class.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in the result requires grad.
    """
    changes: list[Any] = [revert, partial(convert, fusions=False)]
    sides = [_measure(*_copied(model, inputs, loss, targets, change)) for change in changes]
    device = _tensors([inputs, list(model.parameters())])[0].device.type
    return CostReport(name or type(model).__name__, device, *sides)


def measure(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    targets: Sequence[Any] = (),
) -> Cost:
    """The cost of one forward and one backward of ``model`` as it is. They run on a copy, twice
    forward and once backward.

    What a checkpoint computes again counts as backward's. Backward of a reentrant one is nobody's:
    it stands under "(outside)".

    Args:
        model: a module, on any device; on "meta" nothing is computed and nothing allocated.
        inputs: its positional arguments.
        loss: called as ``loss(output, *targets)``. A module's cost stands under "(loss)", a
            function's under "(outside)". Default: none, and backward starts with ones at every
            output that requires grad.
        targets: see ``loss``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in the result requires grad.
    """
    return _measure(*_copied(model, inputs, loss, targets, lambda module: module))


def _copied(
    model: nn.Module, inputs: Any, loss: Any, targets: Any, change: Callable[[Any], Any]
) -> tuple[Any, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model, loss = copy.deepcopy((model, loss))  # together: what they share stays shared
    inputs, targets = tree_map_only(
        Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (inputs, targets)
    )
    return change(model), inputs, change(loss) if isinstance(loss, nn.Module) else loss, targets


def _measure(
    model: nn.Module, inputs: Sequence[Any], loss: Callable[..., Any] | None, targets: Sequence[Any]
) -> Cost:
    where = _Where(model, loss)

    def forward() -> list[Tensor]:
        output = model(*inputs)
        output = output if loss is None else loss(output, *targets)
        return [t for t in _tensors(output) if t.requires_grad]

    with where.hears():
        with _saved_by(model, where):
            found = forward()
        if not found:
            raise ValueError("nothing to differentiate: no output requires grad")
        del found
        with _Counter(where) as counter:
            roots = forward()
        ones = [torch.ones_like(root) for root in roots]
        with counter:
            torch.autograd.backward(roots, ones)
    return Cost(list(where.layers.values()))


def saved_by(
    model: nn.Module, inputs: Sequence[Any] = (), keywords: dict[str, Any] | None = None
) -> tuple[dict[str, int], dict[str, Function]]:
    """What one forward of ``model`` saves for backward, layer by layer, as :func:`measure` counts
    it; and the loss functions that it calls, with what these save themselves. It runs on a copy."""
    model, inputs, _, keywords = _copied(model, inputs, None, keywords or {}, lambda m: m)
    where = _Where(model, None)
    with where.hears(), _saved_by(model, where), _Losses(where) as losses:
        model(*inputs, **keywords)
    saved = {name: layer.saved_bytes for name, layer in where.layers.items()}
    return saved, {name: Function(f, saved.pop(name)) for name, f in losses.found.items()}


def _saved_by(model: nn.Module, where: _Where) -> watch_saved:
    """Counts what is saved in a block. Without a mode, as in training: where nobody watches, our
    Functions may save other tensors."""
    saved = {_address(t): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}

    def count(t: Tensor) -> None:
        if _address(t) not in saved:
            # alive, so that no other storage takes its address
            saved[_address(t)] = t.untyped_storage()
            where.layer().saved_bytes += t.untyped_storage().nbytes()

    return watch_saved(count)


class _Where:
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


@dataclass
class Function:
    """A function that a model calls: the name of ours that ran, or None if torch's did, and the
    bytes that it saves for backward."""

    ours: str | None
    saved: int


class _Losses(TorchFunctionMode):
    """Makes a layer of each loss function. Whatever is called runs as if there were no mode."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self.where = where
        self.found: dict[str, str | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in LOSSES:
            return func(*args, **kwargs)
        self.where.layers.setdefault(name, Layer(name))
        with self.where.at(name):
            result = func(*args, **kwargs)
        logits = args[0] if args else kwargs.get("input")
        if isinstance(logits, Deferred) and not logits.is_made():
            self.found[name] = "linear_cross_entropy"
        else:
            self.found[name] = name if func is getattr(functional, name) else None
        return result


#: the names of those that reduce
LOSSES = {
    name
    for name in functional.__all__
    if "reduction" in signature(getattr(functional, name)).parameters
}


class _Counter(TorchDispatchMode):
    """Adds every operator's flops and bytes to the layer at work."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if (key := _beneath(func, args)) is not None:
                return func._op_dk(key, *args, **kwargs)
            if _composite(func) and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        direction = "backward" if self.where.in_backward() else "forward"
        layer = self.where.layer()
        for figure, value in (
            (f"{direction}_flops", flops),
            (f"{direction}_bytes", _moved(func, args, kwargs, out)),
        ):
            setattr(layer, figure, getattr(layer, figure) + value)
        return out


def _composite(func: Any) -> bool:
    """Whether it may be no more than the calls that it makes; silu_backward, say, could be written
    so and yet is one operator."""
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


def _beneath(func: Any, args: tuple[Any, ...]) -> DispatchKey | None:
    """The key of the implementation whose calls are to be counted in place of ``func``, an operator
    of ours; None if it counts itself."""
    if func not in OPERATORS:
        return None
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    key = {"cpu": DispatchKey.CPU, "cuda": DispatchKey.CUDA}.get(device)
    return None if key is None or backend_for(device) == "triton" else key


#: operators that write their first argument without reading it
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes read and written."""
    schema = func._schema
    if schema.name.startswith(("aten::empty", "aten::new_empty")):
        return 0
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    mutated = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    known = set(map(_address, _tensors(given)))
    written = _tensors([given.get(a.name) for a in mutated]) + [
        t for t in _tensors(out) if _address(t) not in known
    ]
    if not written:  # a view
        return 0
    if schema.name.startswith("aten::new_") or schema.name.endswith(
        "_like"
    ):  # of its argument it takes the shape
        return sum(map(_bytes, written))
    unread = {a.name for a in mutated if a.kwarg_only or schema.name in OVERWRITES}
    return sum(
        map(
            _bytes,
            written + _tensors([value for name, value in given.items() if name not in unread]),
        )
    )


def _tensors(tree: Any) -> list[Tensor]:
    """Each once."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values())


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    """Those of the elements that are there: an expanded dimension is one element."""
    return t.element_size() * prod(
        n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n
    )


def _short(n: float) -> str:
    """Four digits at most, and the prefix of a power of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if n < 999.5:
            return f"{n:.3g}{prefix}" if n < 99.5 else f"{n:.0f}{prefix}"
        n /= 1000
    return f"{n:.3g}P"


#: of torch.nn.Module.__call__
_lock = threading.RLock()

_aten = torch.ops.aten
#: attention on a CPU, of which torch's counter has no formula of its own (torch 2.13)
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
