"""The spec of rotary_embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (2, 3, 37, 74),
    "small": (1, 4, 16, 64),
    "medium": (2, 8, 64, 64),
    "large": (4, 8, 512, 64),
    "huge": (4, 32, 4096, 128),
}


def _stock(input, cos, sin, interleaved=False, offset=0, positions=None):
    """The usual composition: tables as wide as a row, and x turned by a right angle."""
    p = torch.arange(input.shape[-2], device=input.device) if positions is None else positions
    c, s = cos[p + offset], sin[p + offset]
    if p.dim() == 2:
        c, s = (t.unflatten(0, (-1, *[1] * (input.dim() - 3))) for t in (c, s))
    x, rest = input.split([2 * cos.shape[1], input.shape[-1] - 2 * cos.shape[1]], -1)
    if interleaved:
        c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    y = x * c + turned * s
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


torch.fx.wrap("_stock")  # looks at shapes: one node of a symbolic trace


class _Stock(torch.nn.Module):
    """The same, as a module."""

    def __init__(
        self, dim: int, max_positions: int, base: float = 10000.0, interleaved: bool = False
    ) -> None:
        super().__init__()
        angle = torch.outer(
            torch.arange(max_positions).double(), base ** (-torch.arange(0, dim, 2).double() / dim)
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.interleaved = interleaved

    def forward(self, input: Tensor) -> Tensor:
        return _stock(input, self.cos, self.sin, self.interleaved)


def _tables(make: Make, positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = make.tensor(positions, half, requires_grad=False)
    return angle.cos(), angle.sin()


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(1, 1, 2, 4), *_tables(make, 5, 2)), {"offset": 2}, name="halves")
    partial = {"interleaved": True, "positions": make.index(2, 2, high=5)}
    yield Sample((make.tensor(2, 2, 3), *_tables(make, 5, 1)), partial, name="interleaved, partial")
    yield Sample((make.tensor(3, 2), *_tables(make, 3, 1), True), name="one pair")
    several = {"positions": make.index(1, 1, high=4), "offset": 1}
    yield Sample((make.tensor(1, 2, 1, 1, 3), *_tables(make, 5, 1)), several, name="5-D, partial")
    yield Sample((make.tensor(2, 0, 4), *_tables(make, 3, 2)), name="no rows")


def _large(make: Make, size: str) -> Sample:
    shape = SIZES[size]
    return Sample((make.tensor(*shape), *_tables(make, shape[2], 32 if shape[3] == 64 else 37)))


def _regimes(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(4, 8, 512, 128), *_tables(make, 512, 64), True), name="interleaved")
    positions = {"positions": make.index(4, 512, high=512)}
    yield Sample(
        (make.tensor(4, 512, 8, 128).transpose(1, 2), *_tables(make, 512, 32)),
        positions,
        name="transposed, partial",
    )
    yield Sample((make.tensor(64, 8, 1, 128), *_tables(make, 512, 64)), name="one row")
    yield Sample((make.tensor(8, 4096), *_tables(make, 8, 2048)), name="pairs in a loop")
    odd = make.tensor(4, 8, 512, 74), *_tables(make, 512, 37), True
    yield Sample(odd, {"positions": make.index(4, 512, high=512)}, name="odd pairs")
    tables = _tables(Make(make.device, torch.float32), 512, 32)
    for dtype in (torch.bfloat16, torch.float16):
        half = Make(make.device, dtype)
        yield Sample((half.tensor(4, 8, 512, 64), *tables), name=f"tables in float32, {dtype}")


SPECS = [
    OpSpec(
        name="rotary_embedding",
        rows=(0,),
        family="rotary",
        formula="(a, b)' = (a cos φ - b sin φ, a sin φ + b cos φ);  dx = dy turned by -φ",
        function=functional.rotary_embedding,
        reference=_stock,
        samples=_samples,
        large=_large,
        regimes=_regimes,
        module=(
            nn.RotaryEmbedding,
            _Stock,
            {"dim": 4, "max_positions": 5, "base": 50.0, "interleaved": True},
            lambda make: (make.tensor(2, 2, 3, 6),),
        ),
    ),
]
