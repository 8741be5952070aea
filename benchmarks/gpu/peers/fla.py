"""flash-linear-attention: the modules that ours has, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGE = "flash-linear-attention"


def ops() -> dict[str, Callable[..., Any]]:
    """Imports the package."""
    from fla.modules import activations
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss
    from fla.modules.fused_linear_cross_entropy.ops import fused_linear_cross_entropy_loss
    from fla.modules.norm import layernorm

    return {
        "sigmoid": activations.sigmoid,
        "logsigmoid": activations.logsigmoid,
        "silu": activations.swish,
        "relu_squared": activations.sqrelu,
        "swiglu": activations.swiglu,
        "layer_norm": lambda x, shape, weight, bias: layernorm.layer_norm(x, weight, bias),
        "rms_norm": lambda x, shape, weight: layernorm.rms_norm(x, weight, None),
        "cross_entropy": lambda x, target: cross_entropy_loss(x, target)[0].mean(),
        "linear_cross_entropy": lambda x, weight, target: fused_linear_cross_entropy_loss(
            x, target, weight
        ),
    }
