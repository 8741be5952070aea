"""Gated MLPs of language models as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .linear import Linear, plain_linear

__all__ = ["GEGLUMLP", "SwiGLUMLP"]


class _GatedMLP(torch.nn.Module):
    """Three linear layers, with the names that Llama's checkpoints have."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        bias: bool = False,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate_proj = Linear(dim, hidden, bias, device, dtype)
        self.up_proj = Linear(dim, hidden, bias, device, dtype)
        self.down_proj = Linear(hidden, dim, bias, device, dtype)

    def _is_one_function(self) -> bool:
        return plain_linear(self.gate_proj, self.up_proj, self.down_proj)

    def _in_one(self, function: Callable[..., Tensor], input: Tensor, **options: Any) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        biases = {"gate_bias": gate.bias, "up_bias": up.bias, "down_bias": down.bias}
        options.update(biases, recompute=self.recompute)
        return function(input, gate.weight, up.weight, down.weight, **options)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"


class SwiGLUMLP(_GatedMLP):
    """y = (silu(x Wgᵀ) x Wuᵀ) Wdᵀ: the MLP of Llama, in one Function. See
    :func:`custom_backprop.functional.swiglu_mlp`.

    Its layers are ``gate_proj``, ``up_proj`` and ``down_proj``. If one of them has hooks, or is no
    plain linear layer any more, they are called one after another, and ``recompute`` does nothing.

    Args:
        dim: features of the input and of the output.
        hidden: features between them.
        bias: whether the three layers have one.
        recompute: whether backward makes the two inner products again, so that only the input is
            saved.
        device, dtype: of the parameters.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_one_function():
            return self.down_proj(F.swiglu(self.gate_proj(input), self.up_proj(input)))
        return self._in_one(F.swiglu_mlp, input)


class GEGLUMLP(_GatedMLP):
    """y = (gelu(x Wgᵀ) x Wuᵀ) Wdᵀ: the MLP of T5 1.1 and Gemma, in one Function. See
    :func:`custom_backprop.functional.geglu_mlp`.

    Args:
        dim, hidden, bias, recompute, device, dtype: as in :class:`SwiGLUMLP`, and so are the
            layers.
        approximate: ``"none"`` or ``"tanh"``, as in ``torch.nn.GELU``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        bias: bool = False,
        recompute: bool = False,
        approximate: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, bias, recompute, device, dtype)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_one_function():
            gate = self.gate_proj(input)
            return self.down_proj(F.geglu(gate, self.up_proj(input), approximate=self.approximate))
        return self._in_one(F.geglu_mlp, input, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"
