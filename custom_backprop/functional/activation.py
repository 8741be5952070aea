"""Activations, with the names and signatures of ``torch.nn.functional``.

Each takes a floating-point tensor of any shape and strides and returns one of the same shape and
dtype. An integer, complex or nested tensor gives what stock gives, result or error.
``inplace=True`` writes the result over the input. It saves memory where backward needs the output
alone (relu, leaky_relu with a slope >= 0, threshold with a value <= its threshold); the others keep
a copy of the input.

Raises:
    TypeError: what is no tensor, or a parameter that is no number.
    RuntimeError: ``inplace=True`` for a leaf that requires grad.

Derivations: :mod:`custom_backprop.formulas.activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as stock

from ..ops.activation import activate_, activations
from .inference import stock_without_gradient

__all__ = [
    "celu", "celu_", "elu", "elu_", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_", "leaky_relu",
    "leaky_relu_", "logsigmoid", "mish", "relu", "relu6", "relu_", "relu_squared", "selu", "selu_", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "threshold_",
]  # fmt: skip


@stock_without_gradient(stock.relu)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = max(x, 0);  dx = dy [y > 0]."""
    return activate_("relu", input) if inplace else activations["relu"](input)


@stock_without_gradient(stock.relu6)
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x, 0), 6);  dx = dy [0 < y < 6]."""
    return activate_("relu6", input) if inplace else activations["relu6"](input)


@stock_without_gradient(stock.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else a x;  dx = dy or a dy, with a = ``negative_slope``."""
    return (
        activate_("leaky_relu", input, negative_slope)
        if inplace
        else activations["leaky_relu"](input, negative_slope)
    )


@stock_without_gradient(stock.elu)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else α (e^x - 1);  dx = dy or dy α e^x."""
    return activate_("elu", input, alpha) if inplace else activations["elu"](input, alpha)


@stock_without_gradient(stock.selu)
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = λ elu(x; α) with λ = 1.0507, α = 1.6733;  dx = dy λ elu'(x; α)."""
    return activate_("selu", input) if inplace else activations["selu"](input)


@stock_without_gradient(stock.celu)
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else α (e^(x/α) - 1);  dx = dy or dy e^(x/α).

    Raises:
        RuntimeError: ``alpha`` is 0.
    """
    if alpha == 0:
        raise RuntimeError("ZeroDivisionError: alpha cannot be 0 for CELU")
    return activate_("celu", input, alpha) if inplace else activations["celu"](input, alpha)


@stock_without_gradient(stock.gelu)
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """y = x Φ(x);  dx = dy (Φ(x) + x φ(x)), or with ``approximate="tanh"`` the tanh form of Φ.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
        TypeError: it is not a str.
    """
    if not isinstance(approximate, str):
        raise TypeError(f"gelu: approximate must be a str, not {type(approximate).__name__}")
    if approximate == "none":
        return activations["gelu"](input)
    if approximate == "tanh":
        return activations["gelu_tanh"](input)
    raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")


@stock_without_gradient(stock.silu)
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x σ(x);  dx = dy σ (1 + x (1 - σ))."""
    return activate_("silu", input) if inplace else activations["silu"](input)


@stock_without_gradient(stock.mish)
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x t, t = tanh(softplus(x));  dx = dy (t + x (1 - t²) σ(x))."""
    return activate_("mish", input) if inplace else activations["mish"](input)


@stock_without_gradient(torch.sigmoid)
def sigmoid(input: Tensor) -> Tensor:
    """y = σ(x);  dx = dy y (1 - y)."""
    return activations["sigmoid"](input)


def logsigmoid(input: Tensor) -> Tensor:
    """y = log σ(x);  dx = dy σ(-x)."""
    return activations["logsigmoid"](input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x/6 + 1/2, 0), 1);  dx = dy [-3 < x < 3] / 6."""
    return activate_("hardsigmoid", input) if inplace else activations["hardsigmoid"](input)


@stock_without_gradient(stock.hardswish)
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x hardsigmoid(x);  dx = 0, dy (x/3 + 1/2) or dy where x is below, inside or above [-3,
    3]."""
    return activate_("hardswish", input) if inplace else activations["hardswish"](input)


@stock_without_gradient(stock.hardtanh)
def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """y = min(max(x, l), h);  dx = dy [l < y < h].

    Raises:
        ValueError: ``min_val`` exceeds ``max_val``.
    """
    if min_val > max_val:
        raise ValueError(f"min_val cannot be greater than max_val, got {min_val} and {max_val}")
    return (
        activate_("hardtanh", input, min_val, max_val)
        if inplace
        else activations["hardtanh"](input, min_val, max_val)
    )


@stock_without_gradient(torch.tanh)
def tanh(input: Tensor) -> Tensor:
    """y = tanh(x);  dx = dy (1 - y²)."""
    return activations["tanh"](input)


def tanhshrink(input: Tensor) -> Tensor:
    """y = x - tanh(x);  dx = dy tanh²(x)."""
    return activations["tanhshrink"](input)


@stock_without_gradient(stock.softplus)
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """y = log(1 + e^(βx)) / β, and x where βx > θ;  dx = dy σ(βx), and dy there."""
    return activations["softplus"](input, beta, threshold)


def softsign(input: Tensor) -> Tensor:
    """y = x / (1 + |x|);  dx = dy / (1 + |x|)²."""
    return activations["softsign"](input)


@stock_without_gradient(stock.softshrink)
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x - λ, x + λ or 0 where x is above λ, below -λ or between;  dx = dy [|x| > λ].

    Raises:
        RuntimeError: ``lambd`` is negative.
    """
    if lambd < 0:
        raise RuntimeError(f"lambda must be greater or equal to 0, but found to be {lambd}.")
    return activations["softshrink"](input, lambd)


@stock_without_gradient(stock.hardshrink)
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x [|x| > λ];  dx = dy [|x| > λ]."""
    return activations["hardshrink"](input, lambd)


@stock_without_gradient(stock.threshold)
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """y = x where x > θ, else v;  dx = dy [x > θ]."""
    return (
        activate_("threshold", input, threshold, value)
        if inplace
        else activations["threshold"](input, threshold, value)
    )


def relu_squared(input: Tensor) -> Tensor:
    """y = max(x, 0)²;  dx = 2 dy max(x, 0) (So et al., Primer, 2021)."""
    return activations["relu_squared"](input)


def relu_(input: Tensor) -> Tensor:
    """:func:`relu` in place."""
    return activate_("relu", input)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """:func:`leaky_relu` in place."""
    return activate_("leaky_relu", input, negative_slope)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`elu` in place."""
    return activate_("elu", input, alpha)


def selu_(input: Tensor) -> Tensor:
    """:func:`selu` in place."""
    return activate_("selu", input)


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`celu` in place."""
    return celu(input, alpha, inplace=True)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """:func:`hardtanh` in place."""
    return hardtanh(input, min_val, max_val, inplace=True)


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """:func:`threshold` in place."""
    return activate_("threshold", input, threshold, value)
