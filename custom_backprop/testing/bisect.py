"""``bisect``: which layer of a model computes another result, or another gradient, than its
twin's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..conversions.patch import is_patched, patch
from .case import is_float
from .replay import Named, calls_of, shaken


@dataclass
class Layer:
    """One module and its twin, run on the same inputs. Errors are in ulps, the largest of all
    calls; ``backward`` is None if no gradient arrived."""

    name: str
    kind: str
    dtype: str
    """the coarsest dtype in which the twin computes: these are its ulps"""
    forward: float = 0.0
    backward: float | None = None
    worst_result: str = ""
    """what has the error ``forward``, such as "output" or "buffer running_var" """
    worst_gradient: str = ""
    """what has the error ``backward``, such as "input" or "weight" """
    random: bool = False
    """the two draw different random numbers: they cannot be compared"""

    def note(self, result: tuple[float, str], gradient: tuple[float, str]) -> None:
        """Keeps the larger of these errors and those of earlier calls."""
        self.forward, self.worst_result = max((self.forward, self.worst_result), result)
        if gradient[1]:
            before = (self.backward or 0.0, self.worst_gradient)
            self.backward, self.worst_gradient = max(before, gradient)


@dataclass
class Bisection:
    """The result of :func:`bisect`. Prints as a table, in the order of execution."""

    tolerance: float
    layers: list[Layer] = field(default_factory=list)
    not_called: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self._wrong()

    @property
    def first_forward(self) -> Layer | None:
        """The first layer, in the order of execution, whose forward is wrong."""
        return next((x for x in self._causes() if x.forward > self.tolerance), None)

    @property
    def first_backward(self) -> Layer | None:
        """The first layer, in the order of backward, whose gradients alone are wrong."""
        return next((x for x in self._causes()[::-1] if x.forward <= self.tolerance), None)

    def verdict(self) -> str:
        """Which layer is wrong first: a line for forward and a line for backward."""
        lines = []
        if (x := self.first_forward) is not None:
            lines.append(f"{_title(x)}: forward, {x.worst_result}, {_number(x.forward)} ulps")
        if (x := self.first_backward) is not None:
            error = f"gradient of {x.worst_gradient}, {_number(x.backward)} ulps"
            lines.append(f"{_title(x)}: backward, {error}")
        if not lines:
            random = sum(x.random for x in self.layers)
            return "nothing is wrong" + f", as far as can be said: {random} random" * bool(random)
        return "\n".join(f"first wrong: {line}" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "verdict": self.verdict()}

    def _wrong(self) -> list[Layer]:
        return [
            x
            for x in self.layers
            if not x.random and max(x.forward, x.backward or 0.0) > self.tolerance
        ]

    def _causes(self) -> list[Layer]:
        """The wrong layers inside which no other one is wrong."""
        wrong = self._wrong()
        return [x for x in wrong if not any(_is_inside(y, x) for y in wrong)]

    def __str__(self) -> str:
        wrong = self._wrong()
        rows = [("module", "kind", "ulps of", "forward", "backward", "")]
        for x in self.layers:
            mark = "random" if x.random else "WRONG" if x in wrong else ""
            numbers = (x.dtype, _number(x.forward), _number(x.backward), mark)
            rows.append((x.name or "(the model)", x.kind, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, "<<<>><", widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.not_called:
            lines.append(f"never called: {', '.join(self.not_called)}")
        if any(x.random for x in self.layers):
            lines.append(
                "random: the two draw different numbers, so that nothing can be said. Set p=0, or "
                "call eval()"
            )
        return "\n".join([*lines, self.verdict()])


def bisect(
    model: nn.Module,
    twin: nn.Module,
    batch: Any,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 8.0,
    loss: Callable[[Any], Tensor] | None = None,
) -> Bisection:
    """Names the first layer of ``model`` whose forward or backward differs from its twin's.

    The twin runs once on the batch, forward and backward. Then each module of ``model`` and of
    ``twin`` runs alone, on what the twin's module got: its inputs, the state of the random numbers,
    and the gradients of its outputs. So an error does not spread to the layers after it. Outputs,
    buffers, and the gradients of inputs and parameters are compared. Where a module is wrong and
    all modules inside it are right, the mistake is in its own ``forward``.

    One ulp is eps of the dtype times the largest magnitude in the twin's tensor. It is larger in
    two cases. The twin may compute in a coarser dtype: Hugging Face's norms do so in float64. And
    the twin may round by more itself: a gradient that is zero but for rounding has no correct
    digits. The twin's own rounding is its distance to the same module in float64. For float64, it
    is what changes if inputs, parameters and gradients change in their last place.

    Both models are copied, and so stay as they are.

    Args:
        model, twin: two models whose modules have the same names and whose parameters are equal,
            such as ``custom_backprop.convert(copy.deepcopy(twin))`` and ``twin``.
        batch: a tensor, a tuple or list of arguments, or a dict of keywords.
        dtype: that both are converted to.
        tolerance: in ulps.
        loss: computes from the model's output the scalar that is differentiated. Default: the
            output's ``loss``; if it has none, a sum of its elements with random weights.

    Returns:
        a :class:`Bisection`, to print. ``ok`` says whether nothing is wrong.

    Raises:
        ValueError: modules, parameters or buffers of the two differ.
    """
    with torch.enable_grad(), _forked_random_numbers(model):
        model, twin = (copy.deepcopy(m).to(dtype) for m in (model, twin))
        _check(model, twin)
        truth = copy.deepcopy(twin).double()
        calls = calls_of(twin, batch, dtype, loss)
        shake = dtype == torch.float64
        for p in truth.parameters() if shake else ():
            p.data = shaken(p.data)
        layers: dict[str, Layer] = {}
        for call in calls:
            module, its = model.get_submodule(call.name), twin.get_submodule(call.name)
            with patch() if is_patched(model) else nullcontext():
                ours = call.run(module, dtype)
            stock = call.run(its, dtype)
            with _Coarsest(dtype) as coarsest:
                noise = call.run(truth.get_submodule(call.name), torch.float64, shake=shake)
            eps = torch.finfo(coarsest.dtype).eps
            forward, backward = (_worst(*x, eps) for x in zip(ours, stock, noise, strict=True))
            new = Layer(call.name, type(module).__name__, str(coarsest.dtype).split(".")[1])
            layer = layers.setdefault(call.name, new)
            layer.note(forward, backward)
            if forward[0] > tolerance:
                again = call.run(its, dtype, seed=1)
                layer.random |= _worst(again[0], stock[0], noise[0], eps)[0] > tolerance
    not_called = [
        name
        for name, module in twin.named_modules()
        if name not in layers and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    return Bisection(tolerance, list(layers.values()), not_called)


class _Coarsest(TorchDispatchMode):
    """Notes the coarsest dtype in which anything is computed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        dtypes = [t.dtype for t in tree_leaves(result) if is_float(t)]
        self.dtype = max([self.dtype, *dtypes], key=lambda d: torch.finfo(d).eps)
        return result


def _worst(ours: Named, stock: Named, noise: Named, eps: float) -> tuple[float, str]:
    """The largest error in ulps, and of what."""
    names = {**stock, **ours}
    errors = [(_ulps(ours.get(n), stock.get(n), noise.get(n), eps), n) for n in names]
    return max(errors, key=lambda e: e[0], default=(0.0, ""))


def _ulps(ours: Tensor | None, stock: Tensor | None, noise: Tensor | None, eps: float) -> float:
    if ours is None or stock is None or noise is None or ours.shape != stock.shape:
        return math.inf
    a, b, c = ((t.to_dense() if t.is_sparse else t).double() for t in (ours, stock, noise))
    error = _largest(_apart(a, b))
    own = _apart(c, b).nan_to_num(posinf=0)
    ulp = max(eps * _largest(b.nan_to_num(0, 0, 0)), _largest(own))
    return error / ulp if ulp else math.inf if error else 0.0


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|: zero where both are the same infinity, infinity where one is NaN or infinite."""
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _check(model: nn.Module, twin: nn.Module) -> None:
    """Whether the two have the same modules, parameters and buffers."""
    for what in ("modules", "parameters", "buffers"):
        ours, stock = (
            dict(getattr(m, f"named_{what}")(remove_duplicate=False)) for m in (model, twin)
        )
        alone = [f"{n!r} in the model" for n in ours if n not in stock]
        alone += [f"{n!r} in the twin" for n in stock if n not in ours]
        if alone:
            raise ValueError(f"the {what} of model and twin differ: only {', only '.join(alone)}")
        for n in ours if what != "modules" else ():
            if not torch.equal(ours[n], stock[n]):
                shapes = f"{tuple(ours[n].shape)} and {tuple(stock[n].shape)}"
                raise ValueError(
                    f"the {what} {n!r} of model and twin, of shapes {shapes}, are not equal: "
                    "twin.load_state_dict(model.state_dict()) first"
                )


def _forked_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    """Restores the state of the random numbers afterwards, on the CPU and the model's devices."""
    devices = {p.device for p in model.parameters() if p.device.index is not None}
    kind = next((d.type for d in devices), "cuda")
    return torch.random.fork_rng(sorted(d.index for d in devices), device_type=kind)


def _is_inside(inner: Layer, outer: Layer) -> bool:
    return inner is not outer and (not outer.name or inner.name.startswith(f"{outer.name}."))


def _title(layer: Layer) -> str:
    return f"{layer.name or 'the model'} ({layer.kind})"


def _number(ulps: float | None) -> str:
    return "-" if ulps is None else f"{ulps:.1f}" if ulps < 1000 else f"{ulps:.1e}"
