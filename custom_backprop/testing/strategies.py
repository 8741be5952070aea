"""hypothesis strategies: shapes, where the elements of a tensor lie in memory, and tensors.

``pip install 'custom_backprop[validate]'`` installs hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from .inputs import contiguous

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """Where the elements of a tensor lie in a buffer, as the arguments of ``as_strided``."""

    shape: Shape
    stride: Shape
    offset: int = 0

    @classmethod
    def contiguous(cls, shape: Sequence[int]) -> View:
        """The view that torch gives a new tensor."""
        return cls(tuple(shape), contiguous(tuple(shape)))

    @property
    def is_contiguous(self) -> bool:
        """Whether torch gives it to a new tensor."""
        return self == View.contiguous(self.shape)

    @property
    def needs(self) -> int:
        """How many elements the buffer must have."""
        if 0 in self.shape:
            return self.offset
        steps = ((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return self.offset + 1 + sum(steps)

    def of(self, buffer: Tensor) -> Tensor:
        """The view of a buffer of one dimension."""
        return buffer.as_strided(self.shape, self.stride, self.offset)

    def buffer(self, t: Tensor) -> Tensor:
        """A buffer of which this view has the values of ``t``. What lies between them is NaN (of
        integers and booleans 0)."""
        between = math.nan if t.is_floating_point() or t.is_complex() else 0
        buffer = t.new_full((self.needs,), between)
        self.of(buffer).copy_(t)
        return buffer

    def holding(self, t: Tensor) -> Tensor:
        """The same values as ``t``, in this view of a buffer."""
        return self.of(self.buffer(t))


def shapes(
    min_dims: int = 0, max_dims: int = 5, max_side: int = 5, min_side: int = 0
) -> st.SearchStrategy[Shape]:
    """Shapes with sides of 0 and 1 among them."""
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(
        tuple
    )


#: how a dimension may lie: with a gap after each element; with stride 0; with the stride of the
#: dimension inside it, so that its rows overlap
GAPPED, EXPANDED, SLIDING = "gapped", "expanded", "sliding"


def laid(shape: Sequence[int], order: Sequence[int], kinds: dict[int, str], offset: int) -> View:
    """The view whose dimensions lie in this order, the innermost last."""
    stride, span, last = [0] * len(shape), 1, 1
    for d in reversed(order):
        kind = kinds.get(d)
        if kind == SLIDING:
            stride[d] = last
            span += last * max(shape[d] - 1, 0)
        elif kind != EXPANDED:
            stride[d] = last = span + (kind == GAPPED)
            span = last * max(shape[d], 1)
    return View(tuple(shape), tuple(stride), offset)


def simple_views(shape: Sequence[int], overlapping: bool = False) -> Iterator[View]:
    """Views of this shape that differ in one thing from a contiguous one."""
    order = range(len(shape))
    yield laid(shape, order, {}, 1)
    if len(shape) > 1:
        yield laid(shape, order[::-1], {}, 0)
    for d in order:
        yield laid(shape, order, {d: GAPPED}, 0)
        if overlapping:
            yield laid(shape, order, {d: EXPANDED}, 0)
            yield laid(shape, order, {d: SLIDING}, 0)


@st.composite
def views(draw: st.DrawFn, shape: Sequence[int], overlapping: bool = False) -> View:
    """Views of this shape: dimensions in any order, gaps between elements and between rows, an
    offset; with ``overlapping`` also expanded dimensions, whose stride is 0, and windows that slide
    by one element. They shrink to a contiguous view."""
    dims = range(len(shape))
    order: Sequence[int] = draw(st.permutations(dims)) if draw(st.booleans()) else dims
    kinds = {}
    if draw(st.booleans()):
        kind = st.sampled_from(("", GAPPED, *((EXPANDED, SLIDING) if overlapping else ())))
        kinds = {d: draw(kind) for d in dims}
    return laid(shape, order, kinds, draw(st.integers(0, 3)))


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[Shape] | None = None,
    dtype: torch.dtype = torch.float64,
    special: Sequence[float] = (),
    scale: float = 3.0,
) -> Tensor:
    """Normal numbers times ``scale`` in some shape and view, now and then one of the values
    ``special``."""
    sides = draw(shapes() if shape is None else shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t = torch.randn(sides, generator=generator, dtype=torch.float64) * scale
    if special:
        values = torch.tensor(special, dtype=torch.float64)[
            torch.randint(len(special), sides, generator=generator)
        ]
        t = torch.where(torch.rand(sides, generator=generator) < 0.3, values, t)
    return draw(views(t.shape)).holding(t.to(dtype))
