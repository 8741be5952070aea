"""The sums over the elements of a gradient or an output, step by step, and a layer's statistics
computed from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reading import Layer

# Columns of the sums, all of which add up over steps and over shards: seven for gradients, seven
# for activations, then updates and units (how many have no gradient, of how many; how many are
# silent, of how many).
SQUARES, SUM, NONZERO, NONFINITE, ELEMENTS, GOOD, BAD = range(7)
GRADIENT, ACTIVATION, UPDATE, WEIGHT = 0, 7, 14, 15
DEAD_UNITS, UNITS, SILENT_UNITS, SEEN_UNITS, WIDTH = range(16, 21)


def sums_of(x: Tensor, by_unit: Tensor | None = None) -> list[Tensor]:
    """‖x‖ (squared later, all at once), Σx, and how many elements are not 0, how many are not
    finite, and how many there are.

    x is first divided by its largest element (``by_unit``: the largest of each row, if it is
    known): the squares of a vanished gradient are too small for float32, and float64 takes ten
    times as long on a CPU.
    """
    elements = x.new_full((), x.numel(), dtype=wide_of(x), layout=torch.strided)
    if x.is_sparse:
        x = x.coalesce().values()
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.numel():
        return [torch.zeros_like(elements)] * 4 + [elements]
    dtype = dtype_of(x)
    largest = (x.abs() if by_unit is None else by_unit).amax().to(dtype)
    nonzero = torch.count_nonzero(x)
    finite = x.is_cpu and math.isfinite(largest.item())  # on a CPU there is nothing to wait for
    # x - x is NaN if x is not finite
    nonfinite = torch.zeros_like(nonzero) if finite else torch.count_nonzero(x - x)
    scaled, wide = x.to(dtype) / largest.clamp_min(torch.finfo(dtype).tiny), largest.to(wide_of(x))
    return [
        torch.linalg.vector_norm(scaled) * wide,
        scaled.sum() * wide,
        nonzero,
        nonfinite,
        elements,
    ]


def squares_of(tensors: list[Tensor]) -> Tensor:
    """‖x‖² of each tensor."""
    norms = [torch.linalg.vector_norm(x, dtype=dtype_of(x)) for x in tensors]
    return torch.stack(norms).to(wide_of(norms[0])).square_()


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32)


def wide_of(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def layer_of(name: str, row: list[float]) -> Layer:
    gradient = _statistics(row[GRADIENT:ACTIVATION])
    activation = _statistics(row[ACTIVATION:UPDATE])
    found: dict[str, float | None] = {
        f"activation_{k}": v for k, v in activation.items() if k != "norm"
    }
    dead = row[DEAD_UNITS] / row[UNITS] if row[UNITS] else None
    if dead is not None and row[SEEN_UNITS]:
        # a silent unit gets no gradient; for shards only the counts are known, not which units they
        # are
        dead = min(dead, row[SILENT_UNITS] / row[SEEN_UNITS])
    return Layer(name, **gradient, **found, dead=dead, update=root(row[UPDATE], row[WEIGHT]))


def _statistics(sums: list[float]) -> dict[str, float | None]:
    steps = sums[GOOD] + sums[BAD]
    if not steps or not sums[ELEMENTS]:
        return {}
    good = sums[ELEMENTS] * sums[GOOD] / steps  # the number of elements in finite steps
    mean = sums[SUM] / good if good else math.nan
    return {
        "norm": math.sqrt(sums[SQUARES] / sums[GOOD]) if good else math.nan,
        "mean": mean,
        "std": math.sqrt(max(sums[SQUARES] / good - mean * mean, 0)) if good else math.nan,
        "zeros": 1 - sums[NONZERO] / sums[ELEMENTS],
        "nonfinite": sums[NONFINITE] / sums[ELEMENTS],
    }


def root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole else None
