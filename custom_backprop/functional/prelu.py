"""The parametric ReLU, as ``torch.nn.functional.prelu``."""

from __future__ import annotations

from torch import Tensor

from ..ops import prelu as ops
from ..ops.route import overridable
from .arguments import cast_to_one_dtype, gains_on_a_cpu, not_tensors

__all__ = ["prelu"]


@gains_on_a_cpu
@overridable
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """y = x where x > 0, else w_c x;  dx = dy or w_c dy, dw_c = Σ dy x over the elements x <= 0 of
    channel c.

    Args:
        input: (N, C, ...), or any shape with a weight of one element.
        weight: (C), or one element for all channels.

    Raises:
        TypeError: one is not a tensor.
        RuntimeError: shapes, dtypes or devices do not fit.
        NotImplementedError: the input is not a floating-point tensor.
    """
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        raise not_tensors("prelu", input, weight)
    if input.dtype != weight.dtype and not cast_to_one_dtype(input, weight):
        raise RuntimeError(
            f"prelu: input and weight must have the same dtype, got {input.dtype} and "
            f"{weight.dtype}"
        )
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        raise RuntimeError(
            "prelu: the weight must have one element, or be 1-D with one for each channel "
            f"(dimension 1) of the input: got a weight of shape {tuple(weight.shape)} for an input "
            f"of shape {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise NotImplementedError(f"prelu is not implemented for {input.dtype}")
    return ops.prelu(input, weight)
