"""Rotary position embedding as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    r"""Turns the pairs of queries or keys: pair i of a row at position p by the angle
    :math:`p\,\text{base}^{-2i/\text{dim}}`. See
    :func:`custom_backprop.functional.rotary_embedding`.

    The tables of cosines and sines are not part of the state. They are computed in float64 and
    stored in float32, which a cast of the model to half precision does not change (only one to
    float64 does), and are made again wherever the module is moved, out of the meta device too.

    Args:
        dim: the numbers of a row that are turned, even; the rest passes through.
        max_positions: rows of the tables.
        base: the larger, the slower the last pairs turn.
        interleaved: whether neighbours are pairs.
        device: that of the tables.

    Shape:
        - input: (..., seq, dim or more); output: the same.

    Raises:
        ValueError: ``dim`` is not positive and even, or ``max_positions`` or ``base`` is not
            positive.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, dim: int, max_positions: int, base: float = 10000.0, interleaved: bool = False,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim <= 0 or dim % 2 or max_positions <= 0 or not base > 0:
            raise ValueError(
                "RotaryEmbedding: dim must be even, and all of dim, max_positions and base "
                f"positive, got {dim}, {max_positions} and {base}"
            )
        self.dim, self.max_positions, self.base = dim, max_positions, base
        self.interleaved = interleaved
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0, device=device), persistent=False)
        self._make_tables()

    def _make_tables(self) -> None:
        """In float64: at position 10,000 an angle in float32 is off by a thousandth."""
        device = self.cos.device
        dtype = torch.float64 if self.cos.dtype == torch.float64 else torch.float32
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        position = torch.arange(self.max_positions, device=device, dtype=torch.float64)
        angle = torch.outer(position, self.base ** (-pair / self.dim))
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self._make_tables()
        return self

    def forward(self, input: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        return F.rotary_embedding(input, self.cos, self.sin, self.interleaved, offset, positions)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, max_positions={self.max_positions}, base={self.base}, "
            f"interleaved={self.interleaved}"
        )
