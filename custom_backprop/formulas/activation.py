"""Activations y = f(x), elementwise, and their derivatives.

The chain rule for an elementwise f is one product: dL/dx_i = dL/dy_i · f'(x_i). So an activation is
a pair (f, f'). If f' can be written with y = f(x) alone, y is saved for backward. That costs no
memory, because the next layer saves y as its input anyway. For piecewise linear functions no
accuracy is lost. For sigmoid and tanh, y is rounded: near the limits, the error of y (1 - y) and 1
- y² is a unit in the last place of y, which is near 1, and not of their own. Both are 0 where y has
reached its limit. PyTorch does the same. To be exact they would have to save x, a tensor more in
every model, and on a CPU to compute a sigmoid or a tanh again; so they are not. The ops that use x
(silu, logsigmoid, gelu, mish, tanhshrink) do not cancel; a loss of a sigmoid is best written with
logits.

At a kink, where there is no derivative, f' is torch's, and so is f''. A tracer leaves it to
autograd to differentiate f, so f is written such that autograd gives the same f'. NaN in gives NaN
out. Throughout, σ(x) = 1 / (1 + e^-x), σ' = σ (1 - σ), t = tanh(x), t' = 1 - t², and [c] is 1 where
c is true, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import elementary
from .constant import with_zero_slope
from .precision import rounded_once

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        formula: y and dx in one line, as ``check`` prints it.
        value: f, as ``value(x, *parameters)``.
        derivative: f', as ``derivative(saved, *parameters)``, where ``saved`` is x, or y if
            ``saves_output``.
        parameters: the names of the parameters and their defaults, in order (None: no default).
        piecewise_linear: f consists of straight lines: f'' = 0 wherever it exists.
    """

    name: str
    formula: str
    value: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    saves_output: bool = False
    parameters: dict[str, float | None] = field(default_factory=dict)
    piecewise_linear: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", rounded_once(self.value))

    def backward(self, dy: Tensor, saved: Tensor, *parameters: float) -> Tensor:
        """dx = dy f'."""
        dx = rounded_once(lambda saved, dy: dy * self.derivative(saved, *parameters))(saved, dy)
        return with_zero_slope(dx, saved) if self.piecewise_linear else dx


def relu(x: Tensor) -> Tensor:
    """y = max(x, 0)."""
    return torch.relu(x)


def relu_derivative(y: Tensor) -> Tensor:
    """f' = [x > 0], and y > 0 exactly where x > 0."""
    return torch.where(y <= 0, 0.0, 1.0).to(y.dtype)


def leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    """y = x where x > 0, else a x."""
    return torch.where(x > 0, x, negative_slope * x)


def leaky_relu_derivative(x: Tensor, negative_slope: float) -> Tensor:
    """f' = 1 where x > 0, else a. It needs x: if a < 0, y does not give the sign of x."""
    return torch.where(x > 0, x.new_ones(()), negative_slope)


def hardtanh(x: Tensor, min_val: float, max_val: float) -> Tensor:
    """y = x clipped to [l, h]."""
    return torch.nn.functional.hardtanh(x, min_val, max_val)


def hardtanh_derivative(y: Tensor, min_val: float, max_val: float) -> Tensor:
    """f' = [l < x < h], and y is strictly between l and h exactly where x is."""
    return torch.where((y <= min_val) | (y >= max_val), 0.0, 1.0).to(y.dtype)


def relu6(x: Tensor) -> Tensor:
    """y = x clipped to [0, 6]."""
    return hardtanh(x, 0.0, 6.0)


def relu6_derivative(y: Tensor) -> Tensor:
    """f' = [0 < x < 6]."""
    return hardtanh_derivative(y, 0.0, 6.0)


def threshold(x: Tensor, threshold: float, value: float) -> Tensor:
    """y = x where x > θ, else v."""
    return torch.where(x <= threshold, value, x)


def threshold_derivative(x: Tensor, threshold: float, value: float) -> Tensor:
    """f' = [x > θ]."""
    return torch.where(x <= threshold, 0.0, 1.0).to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    """y = max(x, 0)²."""
    return relu(x).square()


def relu_squared_derivative(x: Tensor) -> Tensor:
    """f' = 2 max(x, 0)."""
    return 2 * torch.where(x <= 0, 0.0, x)


def elu(x: Tensor, alpha: float) -> Tensor:
    """y = x where x > 0, else α (e^x - 1)."""
    return torch.where(x <= 0, alpha * torch.expm1(x.where(x <= 0, 0)), x)


def elu_derivative(x: Tensor, alpha: float) -> Tensor:
    """f' = 1 where x > 0, else α e^x."""
    return torch.where(x <= 0, alpha * torch.exp(x.where(x < 0, 0)), 1.0)


def selu(x: Tensor) -> Tensor:
    """y = λ elu(x; α), with the constants that preserve mean 0 and variance 1 (Klambauer et al.,
    2017)."""
    return SELU_SCALE * elu(x, SELU_ALPHA)


def selu_derivative(x: Tensor) -> Tensor:
    """f' = λ elu'(x; α)."""
    return SELU_SCALE * elu_derivative(x, SELU_ALPHA)


def celu(x: Tensor, alpha: float) -> Tensor:
    """y = x where x > 0, else α (e^(x/α) - 1)."""
    return torch.where(x <= 0, alpha * torch.expm1((x / alpha).where(x <= 0, 0)), x)


def celu_derivative(x: Tensor, alpha: float) -> Tensor:
    """f' = 1 where x > 0, else e^(x/α): the factor α of y and the inner derivative 1/α cancel, so
    f' is continuous at 0."""
    return torch.where(x <= 0, torch.exp((x / alpha).where(x < 0, 0)), 1.0)


def _normal(x: Tensor) -> Tensor:
    """Φ(x) = erfc(-x / √2) / 2, the normal distribution function. In (1 + erf(x / √2)) / 2 nothing
    is left where erf is rounded to -1: in float32 below -5.4."""
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5))


def gelu(x: Tensor) -> Tensor:
    """y = x Φ(x) (Hendrycks and Gimpel, 2016)."""
    return x * _normal(x)


def gelu_derivative(x: Tensor) -> Tensor:
    """f' = Φ + x φ, since Φ' = φ(x) = e^(-x²/2) / √(2π)."""
    return _normal(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_inner(x: Tensor) -> tuple[Tensor, Tensor]:
    """v = 2 √(2/π) (x + 0.044715 x³), and v'."""
    k = 2 * math.sqrt(2 / math.pi)
    return k * (x + 0.044715 * x * x * x), k * (1 + 3 * 0.044715 * x * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """y = x (1 + tanh(v/2)) / 2 = x σ(v), which does not cancel where v is far below 0."""
    return x * torch.sigmoid(_gelu_inner(x)[0])


def gelu_tanh_derivative(x: Tensor) -> Tensor:
    """f' = σ(v) + x σ'(v) v', and σ'(v) = σ(v) σ(-v)."""
    v, dv = _gelu_inner(x)
    s = torch.sigmoid(v)
    return s + x * (s * torch.sigmoid(-v)) * dv  # x v' alone may overflow


def silu(x: Tensor) -> Tensor:
    """y = x σ(x)."""
    return x * torch.sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    """f' = σ + x σ (1 - σ)."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def mish(x: Tensor) -> Tensor:
    """y = x tanh(softplus(x)) (Misra, 2019)."""
    return x * torch.tanh(torch.nn.functional.softplus(x))


def mish_derivative(x: Tensor) -> Tensor:
    """f' = t + x (1 - t²) σ(x), with t = tanh(softplus(x)), since softplus' = σ."""
    t = torch.tanh(torch.nn.functional.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def sigmoid(x: Tensor) -> Tensor:
    """y = σ(x)."""
    return torch.sigmoid(x)


def sigmoid_derivative(y: Tensor) -> Tensor:
    """f' = y (1 - y). It is at most 1/4: between two layers with weights W and ‖W‖ <= 1, a sigmoid
    shrinks a gradient at least fourfold. If y is near 1, the error is that of y: a unit in the last
    place of 1, not of f'."""
    return y * (1 - y)


def logsigmoid(x: Tensor) -> Tensor:
    """y = log σ(x) = -softplus(-x)."""
    return -elementary.softplus(-x)


def logsigmoid_derivative(x: Tensor) -> Tensor:
    """f' = σ'/σ = 1 - σ(x) = σ(-x)."""
    return elementary.sigmoid(-x)


def hardsigmoid(x: Tensor) -> Tensor:
    """y = (x + 3) / 6 clipped to [0, 1]."""
    return relu6(x + 3) / 6


def hardsigmoid_derivative(x: Tensor) -> Tensor:
    """f' = [-3 < x < 3] / 6."""
    return torch.where((x > -3) & (x < 3), x.new_ones(()) / 6, 0.0)


def hardswish(x: Tensor) -> Tensor:
    """y = x hardsigmoid(x)."""
    return x * relu6(x + 3) / 6


def hardswish_derivative(x: Tensor) -> Tensor:
    """f' = 0 where x <= -3, x/3 + 1/2 between, 1 where x >= 3."""
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0))


def tanh(x: Tensor) -> Tensor:
    """y = tanh(x)."""
    return torch.tanh(x)


def tanh_derivative(y: Tensor) -> Tensor:
    """f' = 1 - y². If |y| is near 1, the error is that of y: a unit in the last place of 1, not of
    f'."""
    return 1 - y * y


def tanhshrink(x: Tensor) -> Tensor:
    """y = x - tanh(x)."""
    return x - torch.tanh(x)


def tanhshrink_derivative(x: Tensor) -> Tensor:
    """f' = 1 - (1 - t²) = t²."""
    return torch.tanh(x).square()


def softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    """y = log(1 + e^(βx)) / β, and x where βx > θ (there they differ by less than e^-θ / β)."""
    z = x * beta
    return torch.where(z > threshold, x, elementary.softplus(z) / beta)


def softplus_derivative(x: Tensor, beta: float, threshold: float) -> Tensor:
    """f' = σ(βx), and 1 where βx > θ."""
    z = x * beta
    inside = torch.where(z >= threshold, threshold, z)
    return torch.where(z > threshold, 1.0, elementary.sigmoid(inside))


def softsign(x: Tensor) -> Tensor:
    """y = x / (1 + |x|)."""
    return x / (1 + x.abs())


def softsign_derivative(x: Tensor) -> Tensor:
    """f' = (1 + |x| - x sign x) / (1 + |x|)² = 1 / (1 + |x|)². It needs x: 1 - |y| would cancel
    where |x| is large. The square would overflow before f' is 0."""
    d = 1 + x.abs()
    return d.reciprocal() / d


def softshrink(x: Tensor, lambd: float) -> Tensor:
    """y = x - λ where x > λ, x + λ where x < -λ, else 0."""
    return torch.where(x > lambd, x - lambd, torch.where(x < -lambd, x + lambd, x * 0))


def hardshrink(x: Tensor, lambd: float) -> Tensor:
    """y = x where |x| > λ, else 0."""
    return torch.where((x >= -lambd) & (x <= lambd), 0.0, x)


def shrink_derivative(x: Tensor, lambd: float) -> Tensor:
    """f' = [|x| > λ], for the soft and the hard shrink."""
    return torch.where((x >= -lambd) & (x <= lambd), 0.0, 1.0).to(x.dtype)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation(
            "relu",
            "y = max(x, 0);  dx = dy [y > 0]",
            relu,
            relu_derivative,
            True,
            piecewise_linear=True,
        ),
        Activation(
            "relu6",
            "y = min(max(x, 0), 6);  dx = dy [0 < y < 6]",
            relu6,
            relu6_derivative,
            True,
            piecewise_linear=True,
        ),
        Activation(
            "leaky_relu",
            "y = x [x > 0] + a x [x <= 0];  dx = dy ([x > 0] + a [x <= 0])",
            leaky_relu,
            leaky_relu_derivative,
            parameters={"negative_slope": 0.01},
            piecewise_linear=True,
        ),
        Activation(
            "elu",
            "y = x or α(e^x - 1);  dx = dy or dy α e^x",
            elu,
            elu_derivative,
            parameters={"alpha": 1.0},
        ),
        Activation("selu", "y = λ elu(x; α);  dx = dy λ elu'(x; α)", selu, selu_derivative),
        Activation(
            "celu",
            "y = x or α(e^(x/α) - 1);  dx = dy or dy e^(x/α)",
            celu,
            celu_derivative,
            parameters={"alpha": 1.0},
        ),
        Activation("gelu", "y = x Φ(x);  dx = dy (Φ + x φ)", gelu, gelu_derivative),
        Activation(
            "gelu_tanh",
            "y = x σ(v), v = 2 √(2/π) (x + 0.044715 x³);  dx = dy (σ(v) + x v' σ(v) σ(-v))",
            gelu_tanh,
            gelu_tanh_derivative,
        ),
        Activation("silu", "y = x σ(x);  dx = dy σ (1 + x (1 - σ))", silu, silu_derivative),
        Activation(
            "mish",
            "y = x t, t = tanh(softplus x);  dx = dy (t + x (1 - t²) σ(x))",
            mish,
            mish_derivative,
        ),
        Activation("sigmoid", "y = σ(x);  dx = dy y (1 - y)", sigmoid, sigmoid_derivative, True),
        Activation("logsigmoid", "y = log σ(x);  dx = dy σ(-x)", logsigmoid, logsigmoid_derivative),
        Activation(
            "hardsigmoid",
            "y = min(max(x/6 + 1/2, 0), 1);  dx = dy [|x| < 3] / 6",
            hardsigmoid,
            hardsigmoid_derivative,
            piecewise_linear=True,
        ),
        Activation(
            "hardswish",
            "y = x hardsigmoid(x);  dx = dy (x/3 + 1/2) inside, 0 or dy outside",
            hardswish,
            hardswish_derivative,
        ),
        Activation(
            "hardtanh",
            "y = min(max(x, l), h);  dx = dy [l < y < h]",
            hardtanh,
            hardtanh_derivative,
            True,
            {"min_val": -1.0, "max_val": 1.0},
            piecewise_linear=True,
        ),
        Activation("tanh", "y = tanh x;  dx = dy (1 - y²)", tanh, tanh_derivative, True),
        Activation(
            "tanhshrink", "y = x - tanh x;  dx = dy tanh² x", tanhshrink, tanhshrink_derivative
        ),
        Activation(
            "softplus",
            "y = log(1 + e^(βx)) / β;  dx = dy σ(βx)",
            softplus,
            softplus_derivative,
            parameters={"beta": 1.0, "threshold": 20.0},
        ),
        Activation(
            "softsign", "y = x / (1 + |x|);  dx = dy / (1 + |x|)²", softsign, softsign_derivative
        ),
        Activation(
            "softshrink",
            "y = x -+ λ or 0;  dx = dy [|x| > λ]",
            softshrink,
            shrink_derivative,
            parameters={"lambd": 0.5},
            piecewise_linear=True,
        ),
        Activation(
            "hardshrink",
            "y = x [|x| > λ];  dx = dy [|x| > λ]",
            hardshrink,
            shrink_derivative,
            parameters={"lambd": 0.5},
            piecewise_linear=True,
        ),
        Activation(
            "threshold",
            "y = x [x > θ] + v [x <= θ];  dx = dy [x > θ]",
            threshold,
            threshold_derivative,
            parameters={"threshold": None, "value": None},
            piecewise_linear=True,
        ),
        Activation(
            "relu_squared",
            "y = max(x, 0)²;  dx = 2 dy max(x, 0)",
            relu_squared,
            relu_squared_derivative,
        ),
    )
}
