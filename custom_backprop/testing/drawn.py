"""Calls whose tensors are drawn by hypothesis: how each is made, and the script that makes them
again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .case import Case
from .naming import importable, parameter_names

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

    from .strategies import View


#: what scripts call the gradient of an output
DY = "dy"

#: (the name of a tensor, its shape, whether its elements may lie in one place) -> its view
ViewOf = Callable[[str, Sequence[int], bool], "View"]


@dataclass
class Buffer:
    """Memory of one dimension, in which one or more tensors lie: uniform numbers in [low, high), or
    values that are given."""

    name: str
    dtype: torch.dtype
    device: torch.device
    low: float = 0.0
    high: float = 1.0
    values: list[Any] | None = None
    size: int = 0
    holds: int = 0
    """how many tensors lie in it"""

    def make(self, generator: torch.Generator) -> Tensor:
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype, device=self.device)
        made = torch.empty(self.size, dtype=self.dtype)
        return made.uniform_(self.low, self.high, generator=generator).to(self.device)

    def source(self) -> str:
        if self.values is not None:
            made = f"torch.tensor({self.values}, dtype={self.dtype})"
        else:
            made = f"torch.empty({self.size}, dtype={self.dtype}).uniform_({self.low}, {self.high})"
        return made if self.device.type == "cpu" else f'{made}.to("{self.device}")'


@dataclass
class Drawn:
    """One tensor of a call: a view of a buffer, or another tensor itself."""

    name: str
    buffer: Buffer
    view: View
    requires_grad: bool = False
    same: Drawn | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is contiguous and shares its memory with nobody."""
        return self.same is None and self.buffer.holds < 2 and self.view.is_contiguous

    def source(self) -> str:
        """The line that makes it."""
        if self.same is not None:
            return f"{self.name} = {self.same.name}"
        made = self.buffer.name if self.buffer.holds > 1 else self.buffer.source()
        view = self.view
        if not view.is_contiguous or self.buffer.size != math.prod(view.shape):
            made += f".as_strided({view.shape}, {view.stride}, {view.offset})"
        elif len(view.shape) != 1:
            made += f".view({view.shape})"
        return f"{self.name} = {made}" + ".requires_grad_()" * self.requires_grad


def plain(t: Tensor) -> Tensor:
    """A contiguous copy. The script has the same line."""
    return t.clone(memory_format=torch.contiguous_format)


PLAIN = "plain = lambda t: t.clone(memory_format=torch.contiguous_format)"


@dataclass
class Call:
    """``case`` with drawn tensors.

    Attributes:
        tensors: position or keyword -> the tensor there.
        dys: the gradients of the outputs, once they are drawn.
    """

    case: Case
    tensors: dict[int | str, Drawn]
    dys: list[Drawn] = field(default_factory=list)

    def made(self) -> tuple[Case, list[Tensor], list[Tensor]]:
        """The case, its leaves, and the gradients of its outputs. Two inputs that are one tensor
        are one leaf, twice."""
        generator, made = torch.Generator().manual_seed(0), {}
        for drawn in (*self.tensors.values(), *self.dys):
            if id(drawn.buffer) not in made:
                made[id(drawn.buffer)] = drawn.buffer.make(generator)
        views = {key: d.view.of(made[id(d.buffer)]) for key, d in self.tensors.items()}
        dys = [d.view.of(made[id(d.buffer)]) for d in self.dys]
        args, kwargs = list(self.case.args), dict(self.case.kwargs)
        for key, view in views.items():
            if isinstance(key, str):
                kwargs[key] = view
            else:
                args[key] = view.detach().requires_grad_(self.tensors[key].requires_grad)
        case = replace(self.case, args=tuple(args), kwargs=kwargs)
        leaves: dict[int, Tensor] = {}
        for key in self.case.wanted:
            drawn = self.tensors[key]
            leaves[id(drawn)] = leaves[id(drawn.same)] if drawn.same else args[key]
        return case, list(leaves.values()), dys

    def copied(self) -> tuple[Case, list[Tensor], list[Tensor]]:
        """The same with contiguous copies of each tensor."""
        case, leaves, dys = self.made()
        kwargs = {k: plain(a) if isinstance(a, Tensor) else a for k, a in case.kwargs.items()}
        args = [
            plain(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in case.args
        ]
        case = replace(case, args=tuple(args), kwargs=kwargs)
        return case, [plain(x.detach()).requires_grad_() for x in leaves], [*map(plain, dys)]

    def together(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of separate leaves, summed over those that are one tensor in this call."""
        drawn = [self.tensors[i] for i in self.case.wanted]
        owner = [d.same or d for d in drawn]
        found: list[Tensor | None] = []
        for one in owner:
            parts = [g for g, o in zip(grads, owner, strict=True) if o is one and g is not None]
            found.append(sum(parts[1:], parts[0]) if parts else None)
        return found

    def script(self, against: str, *, backward: bool = True) -> str:
        """A script that prints both results: those of the call, and those of contiguous copies
        (``against="copies"``) or of the reference ("reference"), or only the call ("")."""
        function, imported = importable(self.case.function, "function", self.case.name)
        imports, lines = {imported}, []
        if any(d.buffer.values is None for d in (*self.tensors.values(), *self.dys)):
            lines.append("torch.manual_seed(0)")
        named: set[int] = set()
        tensors = [*self.tensors.values(), *(self.dys if backward else ())]
        for d in tensors:
            if d.buffer.holds > 1 and id(d.buffer) not in named:
                named.add(id(d.buffer))
                lines.append(f"{d.buffer.name} = {d.buffer.source()}")
            lines.append(d.source())
        if against == "copies":
            lines.append(PLAIN)

        def printed(of: str, copied: bool) -> str:
            def name(d: Drawn) -> str:
                return f"plain({d.name})" if copied and not d.is_plain else d.name

            given = [
                name(self.tensors[i]) if i in self.tensors else repr(a)
                for i, a in enumerate(self.case.args)
            ]
            given += [
                f"{k}={name(self.tensors[k]) if k in self.tensors else repr(a)}"
                for k, a in self.case.kwargs.items()
            ]
            result = f"{of}({', '.join(given)})"
            if not backward:
                return f"print({result})"
            leaves = {
                (self.tensors[i].same or self.tensors[i]).name: None for i in self.case.wanted
            }
            dys = ", ".join(map(name, self.dys))
            return (
                f"print(torch.autograd.grad({result}, [{', '.join(leaves)}], [{dys}], "
                "allow_unused=True))"
            )

        lines.append(printed(function, False))
        if against == "copies":
            lines.append(printed(function, True))
        elif against == "reference":
            reference, imported = importable(self.case.reference, "reference", "the reference")
            if reference == function:
                imported, reference = f"{imported} as reference", "reference"
            imports.add(imported)
            lines.append(printed(reference, False))
        return "\n".join(["import torch", *sorted(imports - {"", "import torch"}), "", *lines])


def _range(t: Tensor) -> tuple[float, float]:
    """The range of the finite values of a sample, or one near it if it is a single number."""
    values = t.detach()[t.isfinite()]
    if not values.numel():
        return 0.25, 0.75
    low, high = (float(f"{v.item():.3g}") for v in (values.min(), values.max()))
    if low < high:
        return low, high
    return (0.0, 0.5) if low == 0 else (min(low, 0.75 * low), max(low, 0.75 * low))


class Source:
    """Draws calls that are like a case.

    Args:
        case: the sample.
        own: keep the sample's own sizes and values, because others are refused.
    """

    def __init__(self, case: Case, own: bool = False) -> None:
        self.case, self.own = case, own
        self.given: dict[int | str, Tensor] = {
            i: a.detach() for i, a in enumerate(case.args) if isinstance(a, Tensor)
        }
        self.given |= {k: a.detach() for k, a in case.kwargs.items() if isinstance(a, Tensor)}
        others = [a for a in (*case.args, *case.kwargs.values()) if _is_shape(a)]
        self.sizes = sorted({n for t in (*self.given.values(), *others) for n in _sides(t)})
        names = parameter_names(case.function, len(case.args))
        self.names = {key: names[key] if isinstance(key, int) else key for key in self.given}

    def plain(self, sizes: dict[int, int] | None = None) -> Call:
        """Contiguous tensors, of the sample's sizes or others."""
        from .strategies import View

        return self._call(sizes or {}, lambda name, shape, overlapping: View.contiguous(shape))

    def simple(self) -> Iterator[tuple[Call, ViewOf]]:
        """Calls that differ in one thing from a contiguous one, and of the gradients of their
        outputs the views."""
        from .strategies import EXPANDED, View, laid, simple_views

        def only(target: str, which: int | None) -> ViewOf:
            """A simple view for one tensor; or, if None, stride 0 for its sizes of 1."""

            def view_of(name: str, shape: Sequence[int], overlapping: bool) -> View:
                if name != target:
                    return View.contiguous(shape)
                if which is None:
                    ones = {d: EXPANDED for d, n in enumerate(shape) if n == 1}
                    return laid(shape, range(len(shape)), ones, 0)
                found = list(simple_views(shape, overlapping))
                return found[which % len(found)]

            return view_of

        dims = max((t.dim() for t in self.given.values()), default=0)
        for target in (*self.names.values(), DY):
            for which in range(2 + 3 * dims):
                yield self._call({}, view_of := only(target, which)), view_of
            for n in () if self.own else self.sizes:
                yield self._call({n: 1}, view_of := only(target, None)), view_of
        floats = [k for k, t in self.given.items() if t.is_floating_point()]
        contiguous = only("", None)
        for pair in () if self.own or self.case.isolated else combinations(floats, 2):
            for same in (True, False):
                yield self._call({}, contiguous, {pair: same}.get), contiguous

    def draw(self, data: DataObject, *, resized: bool, layouts: bool) -> tuple[Call, ViewOf]:
        """A call in other sizes, if ``resized``, and other layouts, if ``layouts``; and the views
        of the gradients of its outputs."""
        from hypothesis import strategies as st

        from .strategies import View, views

        def view_of(name: str, shape: Sequence[int], overlapping: bool) -> View:
            return data.draw(views(shape, overlapping)) if layouts else View.contiguous(shape)

        def shares(pair: Any) -> bool | None:
            return data.draw(st.sampled_from((None, True, False))) if layouts else None

        sizes = {}
        if resized and not self.own:
            sizes = {n: data.draw(st.sampled_from(_others(n, few=layouts))) for n in self.sizes}
        return self._call(sizes, view_of, shares), view_of

    def _call(
        self,
        sizes: dict[int, int],
        view_of: ViewOf,
        shares: Callable[[tuple[int | str, int | str]], bool | None] = lambda pair: None,
    ) -> Call:
        """The call of these sizes and views. ``shares`` says of two tensors whether they are one
        (True), or lie in one memory (False), or neither (None)."""
        overlapping = not self.case.isolated
        sizes = {n: sizes.get(n, n) for n in self.sizes}
        wanted, drawn = self.case.wanted, dict[int | str, Drawn]()
        for key, t in self.given.items():
            name, shape = self.names[key], [sizes[n] for n in t.shape]
            random = t.is_floating_point() and not self.own
            view = view_of(name, shape, overlapping and random)
            buffer = Buffer(f"memory_of_{name}", t.dtype, t.device)
            one = Drawn(name, buffer, view, key in wanted)
            if random:
                buffer.low, buffer.high = _range(t)
                for earlier, other in drawn.items() if overlapping else ():
                    if _can_share(other, one) and (same := shares((earlier, key))) is not None:
                        _share(other, one, same)
                        break
            else:
                values = torch.tensor(self._values(t, math.prod(shape), sizes), dtype=t.dtype)
                buffer.values = view.buffer(values.view(shape)).tolist()
            one.buffer.size = max(one.buffer.size, one.view.needs)
            one.buffer.holds += one.same is None
            drawn[key] = one
        renamed = [_renamed(a, sizes) for a in self.case.args]
        kwargs = {k: _renamed(a, sizes) for k, a in self.case.kwargs.items()}
        return Call(replace(self.case, args=tuple(renamed), kwargs=kwargs), drawn)

    def _values(self, t: Tensor, count: int, sizes: dict[int, int]) -> list[Any]:
        """The sample's values, as many as needed, in order if they are. An integer that may be an
        index stays one in the smallest of the new sizes for which it may be meant."""
        values = t.flatten().tolist() or [t.new_zeros(()).item()]
        ordered = values == sorted(values)
        if t.dtype not in (torch.int64, torch.int32) or sizes == {n: n for n in sizes}:
            return list(islice(cycle(values), count))
        bounds = [max(new, 1) for n, new in sizes.items() if n > max(values)]
        bound = min(bounds, default=0)
        if bound:
            values = [v % bound if v >= 0 else v for v in values]
        found = list(islice(cycle(values), count))
        return sorted(found) if ordered else found


def gradients_for(results: Sequence[Tensor], view_of: ViewOf) -> list[Drawn]:
    """Gradients for the outputs."""
    found = []
    for i, y in enumerate(results):
        view = view_of(DY, y.shape, True)
        name = f"{DY}{i}" if len(results) > 1 else DY
        buffer = Buffer(name, y.dtype, y.device, -1.0, 1.0, size=view.needs, holds=1)
        found.append(Drawn(name, buffer, view))
    return found


def _others(n: int, few: bool) -> list[int]:
    """The sizes that are tried instead of n, itself first."""
    return list(dict.fromkeys((n, 1, n + 1, 0) if few else (n, 1, 0, 2, 3, 5, n + 1)))


def _is_shape(a: Any) -> bool:
    return isinstance(a, (tuple, list)) and bool(a) and all(type(n) is int and n >= 0 for n in a)


def _sides(a: Any) -> Sequence[int]:
    return a.shape if isinstance(a, Tensor) else a


def _renamed(a: Any, sizes: dict[int, int]) -> Any:
    """A tuple of sizes with the new ones; another argument as it is."""
    return type(a)(sizes[n] for n in a) if _is_shape(a) else a


def _can_share(a: Drawn, b: Drawn) -> bool:
    one, other = a.buffer, b.buffer
    return (
        one.values is None
        and a.same is None
        and (one.dtype, one.device) == (other.dtype, other.device)
        and max(one.low, other.low) < min(one.high, other.high)
    )


def _share(a: Drawn, b: Drawn, same: bool) -> None:
    """Lays b into the memory of a, or makes it a itself."""
    a.buffer.low = max(a.buffer.low, b.buffer.low)
    a.buffer.high = min(a.buffer.high, b.buffer.high)
    b.buffer = a.buffer
    if same and a.view.shape == b.view.shape and a.requires_grad == b.requires_grad:
        b.view, b.same = a.view, a
