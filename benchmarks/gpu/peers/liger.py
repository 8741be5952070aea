"""liger-kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGE = "liger-kernel"


def ops() -> dict[str, Callable[..., Any]]:
    """Imports the package."""
    from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction
    from liger_kernel.transformers import functional as liger

    def group_norm(x, groups, weight, bias):
        channels = x.shape[1]
        y = liger.liger_group_norm(x.flatten(2), weight, bias, channels, groups, 1e-5)
        return y.view_as(x)

    return {
        "softmax": lambda x, dim: liger.liger_softmax(x),
        "cross_entropy": liger.liger_cross_entropy,
        "linear_cross_entropy": lambda x, weight, target: liger.liger_fused_linear_cross_entropy(
            x, weight, target
        ),
        "layer_norm": lambda x, shape, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5),
        "rms_norm": lambda x, shape, weight: liger.liger_rms_norm(x, weight, 1e-6, in_place=False),
        "add_rms_norm": lambda x, residual, shape, weight: liger.liger_fused_add_rms_norm(
            x, residual, weight, 1e-6, in_place=False
        ),
        "group_norm": group_norm,
        "kl_div": lambda x, target, reduction: liger.liger_kl_div(x, target, reduction=reduction),
        "embedding": lambda index, table: LigerEmbeddingFunction.apply(table, index),
        "swiglu": liger.liger_swiglu,
        "geglu": lambda a, b, approximate: liger.liger_geglu(a, b),
        "relu_squared": liger.liger_relu_squared,
    }
