"""Linear layers as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import functional as F
from ..functional.linear import activation_parameters

__all__ = ["Linear", "LinearActivation"]


class Linear(torch.nn.Linear):
    """See :func:`custom_backprop.functional.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearActivation(torch.nn.Linear):
    """A linear layer and an activation in one Function. Parameters, their names and initialisation
    are those of ``torch.nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        activation, parameters: as in :func:`custom_backprop.functional.linear_activation`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **parameters: float,
    ) -> None:
        activation_parameters(activation, parameters)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.parameters_of_activation = parameters

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_activation(
            input, self.weight, self.bias, self.activation, **self.parameters_of_activation
        )

    def extra_repr(self) -> str:
        own = [
            f"activation={self.activation!r}",
            *(f"{k}={v}" for k, v in self.parameters_of_activation.items()),
        ]
        return ", ".join([super().extra_repr(), *own])


def listened_to(module: torch.nn.Module) -> bool:
    """Whether somebody hears of its calls, by a hook, also one of all modules, or by a forward put
    on the instance."""
    m = module
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or _has_any_global_hook()
    )


def plain_linear(*modules: torch.nn.Module) -> bool:
    """Whether all are plain linear layers, which nobody listens to or has replaced (by one with an
    adapter, say): what they compute may then be computed without calling them."""
    return all(type(m) in (Linear, torch.nn.Linear) and not listened_to(m) for m in modules)
