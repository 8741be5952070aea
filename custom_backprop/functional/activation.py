"""Activations, with the names and signatures of ``torch.nn.functional``.

Each takes a floating-point tensor of any shape and strides and returns one of the same shape and
dtype. An integer, complex or nested tensor gives what stock gives, result or error.
``inplace=True`` writes the result over the input. It saves memory where backward needs the output
alone (relu, leaky_relu with a slope >= 0, threshold with a value <= its threshold); the others save
a copy of the input.

Raises:
    TypeError: something is not a tensor, or a parameter is not a number.
    RuntimeError: ``inplace=True`` for a leaf that requires grad.

Derivations: :mod:`custom_backprop.formulas.activation`.
"""

from __future__ import annotations

from torch import Tensor
from torch.overrides import has_torch_function

from ..ops.activation import activate_, activations
from .arguments import gains_on_a_cpu, number

__all__ = [
    "celu",
    "celu_",
    "elu",
    "elu_",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "relu_",
    "relu_squared",
    "selu",
    "selu_",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
    "threshold_",
]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = max(x, 0);  dx = dy [y > 0]."""
    return _apply("relu", input, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x, 0), 6);  dx = dy [0 < y < 6]."""
    return _apply("relu6", input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else a x;  dx = dy or a dy, with a = ``negative_slope``."""
    return _apply("leaky_relu", input, inplace, negative_slope)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else α (e^x - 1);  dx = dy or dy α e^x."""
    return _apply("elu", input, inplace, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = λ elu(x; α) with λ = 1.0507, α = 1.6733;  dx = dy λ elu'(x; α)."""
    return _apply("selu", input, inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x where x > 0, else α (e^(x/α) - 1);  dx = dy or dy e^(x/α).

    Raises:
        RuntimeError: ``alpha`` is 0.
    """
    if alpha == 0:
        raise RuntimeError("ZeroDivisionError: alpha cannot be 0 for CELU")
    return _apply("celu", input, inplace, alpha)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """y = x Φ(x);  dx = dy (Φ(x) + x φ(x)), or with ``approximate="tanh"`` the tanh form of Φ.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
        TypeError: it is not a str.
    """
    if not isinstance(approximate, str):
        raise TypeError(f"gelu: approximate must be a str, not {type(approximate).__name__}")
    if approximate == "none":
        return _apply("gelu", input, False)
    if approximate == "tanh":
        return _apply("gelu_tanh", input, False)
    raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x σ(x);  dx = dy σ (1 + x (1 - σ))."""
    return _apply("silu", input, inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x t, t = tanh(softplus(x));  dx = dy (t + x (1 - t²) σ(x))."""
    return _apply("mish", input, inplace)


def sigmoid(input: Tensor) -> Tensor:
    """y = σ(x);  dx = dy y (1 - y)."""
    return _apply("sigmoid", input, False)


@gains_on_a_cpu
def logsigmoid(input: Tensor) -> Tensor:
    """y = log σ(x);  dx = dy σ(-x)."""
    return _apply("logsigmoid", input, False)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x/6 + 1/2, 0), 1);  dx = dy [-3 < x < 3] / 6."""
    return _apply("hardsigmoid", input, inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x hardsigmoid(x);  dx = 0, dy (x/3 + 1/2) or dy where x is below, inside or above [-3,
    3]."""
    return _apply("hardswish", input, inplace)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """y = min(max(x, l), h);  dx = dy [l < y < h].

    Raises:
        ValueError: ``min_val`` exceeds ``max_val``.
    """
    if min_val > max_val:
        raise ValueError(f"min_val cannot be greater than max_val, got {min_val} and {max_val}")
    return _apply("hardtanh", input, inplace, min_val, max_val)


def tanh(input: Tensor) -> Tensor:
    """y = tanh(x);  dx = dy (1 - y²)."""
    return _apply("tanh", input, False)


def tanhshrink(input: Tensor) -> Tensor:
    """y = x - tanh(x);  dx = dy tanh²(x)."""
    return _apply("tanhshrink", input, False)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """y = log(1 + e^(βx)) / β, and x where βx > θ;  dx = dy σ(βx), and dy there."""
    return _apply("softplus", input, False, beta, threshold)


@gains_on_a_cpu
def softsign(input: Tensor) -> Tensor:
    """y = x / (1 + |x|);  dx = dy / (1 + |x|)²."""
    return _apply("softsign", input, False)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x - λ, x + λ or 0 where x is above λ, below -λ or between;  dx = dy [|x| > λ].

    Raises:
        RuntimeError: ``lambd`` is negative.
    """
    if lambd < 0:
        raise RuntimeError(f"lambda must be greater or equal to 0, but found to be {lambd}.")
    return _apply("softshrink", input, False, lambd)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x [|x| > λ];  dx = dy [|x| > λ]."""
    return _apply("hardshrink", input, False, lambd)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """y = x where x > θ, else v;  dx = dy [x > θ]."""
    return _apply("threshold", input, inplace, threshold, value)


def relu_squared(input: Tensor) -> Tensor:
    """y = max(x, 0)²;  dx = 2 dy max(x, 0) (So et al., Primer, 2021)."""
    return _apply("relu_squared", input, False)


def relu_(input: Tensor) -> Tensor:
    """:func:`relu` in place."""
    return _apply("relu", input, True)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """:func:`leaky_relu` in place."""
    return _apply("leaky_relu", input, True, negative_slope)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`elu` in place."""
    return _apply("elu", input, True, alpha)


def selu_(input: Tensor) -> Tensor:
    """:func:`selu` in place."""
    return _apply("selu", input, True)


def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`celu` in place."""
    return celu(input, alpha, inplace=True)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """:func:`hardtanh` in place."""
    return hardtanh(input, min_val, max_val, inplace=True)


def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """:func:`threshold` in place."""
    return _apply("threshold", input, True, threshold, value)


def _apply(name: str, x: Tensor, inplace: bool, *parameters: float) -> Tensor:
    """f(x), or written over x."""
    if parameters and not type(parameters[0]) is float is type(parameters[-1]):
        parameters = tuple([number(name, p) for p in parameters])
    if not isinstance(x, Tensor) and not has_torch_function((x,)):
        raise TypeError(f"{name}: the input must be a Tensor, not {type(x).__name__}")
    return activate_(name, x, *parameters) if inplace else activations[name](x, *parameters)
