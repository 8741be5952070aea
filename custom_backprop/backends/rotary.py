"""The primitive of rotary_embedding, whose backward it is too, with ``inverse``. x is (seq, dim),
(batch, seq, dim) or (batch, heads, seq, dim). The result has the strides of x where they are
dense."""

from __future__ import annotations

import torch

from ..formulas import rotary as formula
from ..formulas.precision import HALF
from .library import R, launcher, primitive


def _complex(t):
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)))


def _aten(x, cos, sin, positions, offset, interleaved, inverse):
    if x.dtype in HALF:
        return torch.empty_like(x).copy_(
            formula.rotate(x, cos, sin, positions, offset, interleaved, inverse)
        )
    half, y = cos.shape[-1], torch.empty_like(x)
    c, s = (formula.at_positions(t, x, offset, positions) for t in (cos, sin))
    s = -s if inverse else s
    if interleaved and 2 * half == x.shape[-1] and x.is_contiguous() and not x.storage_offset() % 2:
        # one product of complex numbers, six times as fast as four of every second number
        torch.mul(_complex(x), torch.complex(c, s), out=_complex(y))
        return y
    a, b = formula.pairs(x, half, interleaved)
    to_a, to_b = formula.pairs(y, half, interleaved)
    torch.mul(a, c, out=to_a).addcmul_(b, s, value=-1)
    torch.mul(b, c, out=to_b).addcmul_(a, s)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


def _sharding(x, cos, sin, positions, *options):
    """Along any dimension but that of the pairs; along that of the rows if their positions are
    given, or else the shards would count from 0."""
    for i in range(x.dim() - 1):
        if positions is None:
            if i < x.dim() - 2:
                yield [i], [i, R, R, None]
        elif i == x.dim() - 2:
            yield [i], [i, R, R, positions.dim() - 1]
        else:
            shared = i or positions.dim() == 1 or positions.shape[0] == 1
            yield [i], [i, R, R, R if shared else 0]


rotate = primitive(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int offset, "
    "bool interleaved, bool inverse) -> Tensor",
    formula=formula.rotate,
    aten=_aten,
    triton=launcher("rotary", "rotate"),
    fake=lambda x, *rest: torch.empty_like(x),
    sharding=_sharding,
)
