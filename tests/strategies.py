"""hypothesis strategies shared by the tests of the op families: shapes, layouts and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def shapes(
    min_dims: int = 0, max_dims: int = 5, max_side: int = 5, min_side: int = 0
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with sides of 0 and 1 among them."""
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(
        tuple
    )


def permuted(t: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, the dimensions lying in memory in the order given."""
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(*order).contiguous().permute(*back)


def gapped(t: Tensor, dim: int, step: int, offset: int) -> Tensor:
    """The same values, every ``step``-th element along ``dim`` of a buffer of NaN that starts
    ``offset`` elements into its storage."""
    sides = [n * step if d == dim else n for d, n in enumerate(t.shape)]
    count = torch.Size(sides).numel()
    buffer = t.new_full((offset + count,), float("nan"))[offset:].view(sides)
    return buffer.unfold(dim, 1, step).squeeze(-1).copy_(t) if count else t.clone()


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    """A function that stores a tensor of ``dims`` dimensions otherwise, its values unchanged."""
    kind = draw(st.sampled_from(("contiguous", "permuted", "gapped"))) if dims else "contiguous"
    if kind == "permuted":
        order = draw(st.permutations(range(dims)))
        return lambda t: permuted(t, order)
    if kind == "gapped":
        dim, step, offset = (
            draw(st.integers(0, dims - 1)),
            draw(st.integers(2, 3)),
            draw(st.integers(0, 3)),
        )
        return lambda t: gapped(t, dim, step, offset)
    return torch.clone


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float64,
    special: Sequence[float] = (),
    scale: float = 3.0,
) -> Tensor:
    """Normal numbers times ``scale`` in some shape and layout, now and then one of the values
    ``special``."""
    sides = draw(shapes() if shape is None else shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    t = torch.randn(sides, generator=generator, dtype=torch.float64) * scale
    if special:
        values = torch.tensor(special, dtype=torch.float64)[
            torch.randint(len(special), sides, generator=generator)
        ]
        t = torch.where(torch.rand(sides, generator=generator) < 0.3, values, t)
    return draw(layouts(t.dim()))(t.to(dtype))
