"""The autograd graph behind a tensor, as plain data that keeps nothing of it alive."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...dtensor import local
from .formulas import formula_of


@dataclass(frozen=True)
class Saved:
    """A tensor that a node holds from forward until backward.

    Attributes:
        bytes: those of its whole storage; 0 if they are counted elsewhere.
        shared: the index of the node that counts the same storage, or None.
        note: "stays anyway" for a parameter or a buffer; "packed" if a hook replaced the tensor,
            as a checkpoint does, which computes it again; "on ctx" if a Function did not use
            ``save_for_backward``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int = 0
    shared: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Flow:
    """The gradient that reaches a node: ∂L/∂y, where forward returned y there.

    Attributes:
        norm: NaN if an element is not finite.
        mean, std: of its elements.
        zeros, nonfinite: fractions of its elements.
        histogram: how many elements have a magnitude in each half decade from ``flow.LOW`` on.
    """

    norm: float
    mean: float
    std: float
    zeros: float
    nonfinite: float
    histogram: tuple[int, ...]


@dataclass
class Edge:
    """Where a node sends a gradient.

    Attributes:
        to: the index of the node that gets it.
        output: which of that node's outputs it belongs to.
        norm: that of the gradient on this edge; None if it was not measured, or nothing was sent.
        mark: as of a node.
    """

    to: int
    output: int
    norm: float | None = None
    mark: str = ""


@dataclass
class Node:
    """One node of the graph.

    Attributes:
        index: its place in the order in which backward runs.
        name: autograd's, such as "AddmmBackward0".
        op: the short name, such as "Addmm"; "leaf" where a gradient ends.
        kind: "ours", "stock", "function" (somebody else's Function), "compiled" or "leaf".
        formula: forward and backward, where they are known.
        label: the name of the tensor that forward returned here; a leaf without one is called
            "parameter" or "leaf".
        named: whether ``label`` is a name.
        shapes, dtype, device: of what forward returned here, and so of the gradient.
        saved: what it holds for backward. A storage is counted once in the whole graph.
        edges: where it sends gradients.
        flow: the gradient that reaches it; None if it was not measured, or there is none.
        mark: "", or what is wrong: "vanishing", "exploding", "zero", "non-finite".
    """

    index: int
    name: str
    op: str
    kind: str
    formula: str
    label: str
    named: bool
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    device: str
    saved: tuple[Saved, ...] = ()
    edges: list[Edge] = field(default_factory=list)
    flow: Flow | None = None
    mark: str = ""

    @property
    def bytes(self) -> int:
        return sum(saved.bytes for saved in self.saved)

    @property
    def norm(self) -> float | None:
        return None if self.flow is None else self.flow.norm


def in_order(root: Any) -> list[Any]:
    """Autograd's nodes behind ``root`` in the order in which the engine runs them: after all that
    send to them, and of those the last of forward first."""
    waits: Counter[Any] = Counter()
    found, stack = {root}, [root]
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None:
                waits[after] += 1
                if after not in found:
                    found.add(after)
                    stack.append(after)
    order: list[Any] = []
    ready, pushed = [(0, 0, root)], 0
    while ready:
        node = heapq.heappop(ready)[-1]
        order.append(node)
        for after, _ in node.next_functions:
            if after is not None:
                waits[after] -= 1
                if not waits[after]:
                    pushed += 1
                    heapq.heappush(ready, (-after._sequence_nr(), pushed, after))
    return order


def read(
    order: list[Any], model: nn.Module | None, names: Mapping[str, Tensor] | None
) -> list[Node]:
    """The data of autograd's nodes, without gradients."""
    index = {node: i for i, node in enumerate(order)}
    labels = _labels(model, names)
    nodes = [_node(i, node, labels) for i, node in enumerate(order)]
    for node, data in zip(order, nodes, strict=True):
        data.edges = [Edge(index[to], nr) for to, nr in node.next_functions if to is not None]
    stays, counted = _staying(order, model), dict[int, int]()
    for i, node in sorted(enumerate(order), key=lambda item: item[1]._sequence_nr()):
        nodes[i].saved = tuple(
            _saved(name, value, note, i, stays, counted) for name, value, note in _holds(node)
        )
    return nodes


def _node(index: int, node: Any, labels: Mapping[Any, str]) -> Node:
    name = node.name().removeprefix("torch::autograd::")
    op, kind = re.sub(r"Backward\w*$", "", name) or name, "stock"
    leaf = leaf_of(node)
    given = label = labels.get(node if leaf is None else id(leaf), "")
    if leaf is not None:
        op, kind = "leaf", "leaf"
        label = given or ("parameter" if isinstance(leaf, nn.Parameter) else "leaf")
    elif function := getattr(node, "_forward_cls", None):
        ours = function.__module__.partition(".")[0] == __name__.partition(".")[0]
        compiled = function.__name__ == "CompiledFunction"
        op, kind = function.__name__, "compiled" if compiled else "ours" if ours else "function"
    outputs = node._input_metadata
    return Node(
        index,
        name,
        op,
        kind,
        formula_of(node, op),
        label,
        bool(given),
        tuple(tuple(map(int, o.shape)) for o in outputs),
        str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
        str(outputs[0].device) if outputs else "",
    )


def leaf_of(node: Any) -> Any:
    """The tensor whose gradient ends here, or None."""
    return getattr(node, "variable", None)


def shape_text(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _labels(model: nn.Module | None, names: Mapping[str, Tensor] | None) -> dict[Any, str]:
    """Names by the id of a leaf, and by the node that made a tensor."""
    found: dict[Any, str] = {}
    for name, parameter in model.named_parameters() if model is not None else ():
        found[id(parameter)] = name.replace("_orig_mod.", "")
    for name, t in (names or {}).items():
        found[id(t) if t.grad_fn is None else t.grad_fn] = name
    return found


def _staying(order: list[Any], model: nn.Module | None) -> set[int]:
    """The storages that stay in memory without backward: of parameters and buffers."""
    tensors: list[Tensor] = [
        leaf for node in order if isinstance(leaf := leaf_of(node), nn.Parameter)
    ]
    if model is not None:
        tensors += [*model.parameters(), *model.buffers()]
    return {address for t in tensors for address, _ in _storages(t)}


def _holds(node: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, tensor or what a hook made of it, note) of all that a node holds. Nothing is unpacked:
    a checkpoint would compute it again."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            raw = getattr(node, name)
            several = isinstance(raw, (tuple, list))
            for i, one in enumerate(raw if several else (raw,)):
                short = name.removeprefix("_raw_saved_") + (f"[{i}]" if several else "")
                value = one.data
                if value is not None:
                    yield short, value, "packed" if one.unpack_hook is not None else ""
    for name, value in vars(node).items() if hasattr(node, "_forward_cls") else ():
        for one in tree_leaves(value):
            if isinstance(one, Tensor):
                yield f"ctx.{name}", one, "on ctx"


def _saved(
    name: str, value: Any, note: str, index: int, stays: set[int], counted: dict[int, int]
) -> Saved:
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    if not tensors:
        return Saved(name, (), "", note=note)
    size, shared = 0, None
    for t in tensors:
        if isinstance(t, nn.Parameter):
            stays.update(address for address, _ in _storages(t))
        for address, count in _storages(t):
            if address in stays:
                note = note or "stays anyway"
            elif address in counted:
                shared = counted[address]
            else:
                counted[address] = index
                size += count
    t = tensors[0]
    dtype = str(t.dtype).removeprefix("torch.")
    return Saved(name, tuple(t.shape), dtype, size, shared, note)


def _storages(t: Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of each storage of a tensor."""
    t = local(t)
    parts = [t._indices(), t._values()] if t.is_sparse else [t]
    try:
        storages = [part.untyped_storage() for part in parts]
        return [(storage._cdata, storage.nbytes()) for storage in storages]
    except (NotImplementedError, RuntimeError):  # a subclass or a layout without a storage
        return [(id(t), t.numel() * t.element_size())]


def size_text(count: float) -> str:
    """Bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def number_text(x: float | None) -> str:
    """A norm in two digits."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return str(x)
    return f"{x:.2g}" if x == 0 or 0.01 <= abs(x) < 1000 else f"{x:.1e}".replace("e-0", "e-")
