"""Activations: device functions (value, derivative) and their launchers.

A device function takes (x, A, B, HALF): see ``pointwise.py``, whose kernels run it. The fused
linear uses the same pairs. Formulas: ``custom_backprop/formulas/activation.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementary, pointwise
from .elementary import constant, divide, expm1
from .launch import Launch, planned
from .pointwise import like


@triton.jit
def hardtanh(x, A, B, HALF: tl.constexpr):
    a, b = constant(A, x), constant(B, x)
    return tl.where(x < a, a, tl.where(x > b, b, x))


@triton.jit
def hardtanh_derivative(y, A, B, HALF: tl.constexpr):
    return tl.where((y <= constant(A, y)) | (y >= constant(B, y)), 0.0, 1.0).to(y.dtype)


@triton.jit
def leaky_relu(x, A, B, HALF: tl.constexpr):
    return tl.where(x > 0, x, x * A)


@triton.jit
def leaky_relu_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where(x > 0, tl.full(x.shape, 1.0, x.dtype), A)


@triton.jit
def threshold(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= constant(A, x), B, x)


@triton.jit
def threshold_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= constant(A, x), 0.0, 1.0).to(x.dtype)


@triton.jit
def relu_squared(x, A, B, HALF: tl.constexpr):
    r = threshold(x, 0.0, 0.0, HALF)
    return r * r


@triton.jit
def relu_squared_derivative(x, A, B, HALF: tl.constexpr):
    return 2 * threshold(x, 0.0, 0.0, HALF)


@triton.jit
def elu(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= 0, A * expm1(tl.where(x <= 0, x, 0.0), HALF), x)


@triton.jit
def elu_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= 0, A * elementary.exp_minus(tl.where(x <= 0, -x, 0.0), HALF), 1.0)


@triton.jit
def selu(x, A, B, HALF: tl.constexpr):
    return 1.0507009873554805 * elu(x, 1.6732632423543772, B, HALF)


@triton.jit
def selu_derivative(x, A, B, HALF: tl.constexpr):
    return 1.0507009873554805 * elu_derivative(x, 1.6732632423543772, B, HALF)


@triton.jit
def celu(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= 0, A * expm1(tl.where(x <= 0, x / A, 0.0), HALF), x)


@triton.jit
def celu_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= 0, elementary.exp(tl.where(x <= 0, x / A, 0.0), HALF), 1.0)


@triton.jit
def gelu(x, A, B, HALF: tl.constexpr):
    tail = elementary.normal_tail(tl.abs(x), HALF)[0]
    return x * tl.where(x < 0, tail, 1 - tail)


@triton.jit
def gelu_derivative(x, A, B, HALF: tl.constexpr):
    tail, density = elementary.normal_tail(tl.abs(x), HALF)
    return tl.where(x < 0, tail, 1 - tail) + x * density


@triton.jit
def _gelu_inner(x):
    """v = 2 √(2/π) (x + 0.044715 x³)."""
    return x * (1.5957691216057308 + 0.07135481627260025 * (x * x))


@triton.jit
def gelu_tanh(x, A, B, HALF: tl.constexpr):
    return x * elementary.sigmoid(_gelu_inner(x), HALF)


@triton.jit
def gelu_tanh_derivative(x, A, B, HALF: tl.constexpr):
    v = _gelu_inner(x)
    slope = 1.5957691216057308 + 0.21406444881780076 * (x * x)
    s = elementary.sigmoid(v, HALF)
    rest = 1 - s if HALF else elementary.sigmoid(-v)
    return s + x * (s * rest) * slope  # x times the slope may overflow


@triton.jit
def silu(x, A, B, HALF: tl.constexpr):
    return x * elementary.sigmoid(x, HALF)


@triton.jit
def silu_derivative(x, A, B, HALF: tl.constexpr):
    s = elementary.sigmoid(x, HALF)
    return s * (1 + x * (1 - s))


@triton.jit
def _tanh_softplus(x):
    """t = tanh(log(1 + e^x)) = (n - 1) / (n + 1) with n = (1 + e^x)², divided by e^2x where x > 0
    so that nothing overflows; also the divided n + 1, and e^-|x|."""
    e = elementary.exp_minus(tl.abs(x))
    d = tl.where(x > 0, 1 + 2 * e * (1 + e), 2 + e * (2 + e))
    return tl.where(x > 0, 1 + 2 * e, e * (2 + e)) / d, d, e


@triton.jit
def _tanh_softplus_half(x):
    """The same in half precision, where t is 1 from 20 on: n - 1, 1 / (n + 1), e^x (1 + e^x) and x,
    each of an x up to 20."""
    x = tl.where(x > 20, 20.0, x)
    e = elementary.exp(x, True)
    product = e + e * e
    m = e + product
    return m, divide(1.0, m + 2, True), product, x


@triton.jit
def mish(x, A, B, HALF: tl.constexpr):
    if HALF:
        m, r, _, _ = _tanh_softplus_half(x)
        return x * (m * r)
    return x * _tanh_softplus(x)[0]


@triton.jit
def mish_derivative(x, A, B, HALF: tl.constexpr):
    """(1 - t²) σ = 4 n / (n + 1)² · e^x / (1 + e^x): written so, nothing cancels where t is near
    1."""
    if HALF:
        m, r, product, most = _tanh_softplus_half(x)
        return r * (m + most * (4 * product * r)) + 0 * x  # of an infinite x NaN, as in float32
    t, d, e = _tanh_softplus(x)
    return t + x * (4 * (1 + e) * tl.where(x > 0, e * e, e) / (d * d))  # 4 x may overflow


@triton.jit
def sigmoid(x, A, B, HALF: tl.constexpr):
    return elementary.sigmoid(x, HALF)


@triton.jit
def sigmoid_derivative(y, A, B, HALF: tl.constexpr):
    return y * (1 - y)


@triton.jit
def logsigmoid(x, A, B, HALF: tl.constexpr):
    return -elementary.softplus(-x, HALF)


@triton.jit
def logsigmoid_derivative(x, A, B, HALF: tl.constexpr):
    return elementary.sigmoid(-x, HALF)


@triton.jit
def hardsigmoid(x, A, B, HALF: tl.constexpr):
    return hardtanh((x + 3) / 6, 0.0, 1.0, HALF)


@triton.jit
def hardsigmoid_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where((x > -3) & (x < 3), 1.0, 0.0).to(x.dtype) / 6


@triton.jit
def hardswish(x, A, B, HALF: tl.constexpr):
    return x * hardtanh(x + 3, 0.0, 6.0, HALF) / 6


@triton.jit
def hardswish_derivative(x, A, B, HALF: tl.constexpr):
    return tl.where(x <= -3, 0.0, tl.where(x < 3, x / 3 + 0.5, 1.0))


@triton.jit
def tanh(x, A, B, HALF: tl.constexpr):
    return elementary.tanh(x, HALF)


@triton.jit
def tanh_derivative(y, A, B, HALF: tl.constexpr):
    return 1 - y * y


@triton.jit
def tanhshrink(x, A, B, HALF: tl.constexpr):
    return x - elementary.tanh(x, HALF)


@triton.jit
def tanhshrink_derivative(x, A, B, HALF: tl.constexpr):
    t = elementary.tanh(x, HALF)
    return t * t


@triton.jit
def softplus(x, A, B, HALF: tl.constexpr):
    z = x * A
    return tl.where(z > B, x, elementary.softplus(z, HALF) / A)


@triton.jit
def softplus_derivative(x, A, B, HALF: tl.constexpr):
    z = x * A
    return tl.where(z > B, 1.0, elementary.sigmoid(z, HALF))


@triton.jit
def softsign(x, A, B, HALF: tl.constexpr):
    return divide(x, 1 + tl.abs(x), HALF)


@triton.jit
def softsign_derivative(x, A, B, HALF: tl.constexpr):
    d = 1 + tl.abs(x)
    return divide(1.0, d * d, HALF)


@triton.jit
def softshrink(x, A, B, HALF: tl.constexpr):
    a = constant(A, x)
    return tl.where(x > a, x - a, tl.where(x < -a, x + a, x * 0))


@triton.jit
def hardshrink(x, A, B, HALF: tl.constexpr):
    a = constant(A, x)
    return tl.where((x >= -a) & (x <= a), 0.0, x)


@triton.jit
def shrink_derivative(x, A, B, HALF: tl.constexpr):
    a = constant(A, x)
    return tl.where((x >= -a) & (x <= a), 0.0, 1.0).to(x.dtype)


#: name -> (value, derivative of the saved tensor), and A and B where the op has no parameters
DEVICE_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "relu": (threshold, threshold_derivative, 0.0, 0.0),
    "threshold": (threshold, threshold_derivative),
    "relu6": (hardtanh, hardtanh_derivative, 0.0, 6.0), "hardtanh": (hardtanh, hardtanh_derivative),
    "leaky_relu": (leaky_relu, leaky_relu_derivative),
    "relu_squared": (relu_squared, relu_squared_derivative),
    "elu": (elu, elu_derivative), "selu": (selu, selu_derivative), "celu": (celu, celu_derivative),
    "gelu": (gelu, gelu_derivative), "gelu_tanh": (gelu_tanh, gelu_tanh_derivative),
    "silu": (silu, silu_derivative), "mish": (mish, mish_derivative),
    "sigmoid": (sigmoid, sigmoid_derivative), "logsigmoid": (logsigmoid, logsigmoid_derivative),
    "hardsigmoid": (hardsigmoid, hardsigmoid_derivative),
    "hardswish": (hardswish, hardswish_derivative), "tanh": (tanh, tanh_derivative),
    "tanhshrink": (tanhshrink, tanhshrink_derivative),
    "softplus": (softplus, softplus_derivative), "softsign": (softsign, softsign_derivative),
    "softshrink": (softshrink, shrink_derivative), "hardshrink": (hardshrink, shrink_derivative),
}  # fmt: skip


#: the activations whose derivative is taken at y
SAVES_OUTPUT = frozenset({"relu", "relu6", "hardtanh", "sigmoid", "tanh"})


def constants(name: str | None, which: int, parameters: tuple[float, ...]) -> dict[str, Any]:
    """A kernel's F, A and B for the value (``which`` 0) or the derivative (1) of an activation;
    each None where there is none."""
    if name is None:
        return {"F": None, "A": None, "B": None}
    *functions, a, b = (*DEVICE_FUNCTIONS[name], *parameters, None, None)[:4]
    return {"F": functions[which], "A": a, "B": b}


@planned
def plan(name: str, which: int, n: int, dtype: torch.dtype, *parameters: float) -> Launch:
    """The value (``which`` 0) or the derivative (1) of ``n`` elements."""
    kernel = (pointwise.forward, pointwise.backward)[which]
    return kernel.launch(**pointwise.grid(n, dtype), **constants(name, which, parameters))


def forward(name: str, x: Tensor, *parameters: float) -> Tensor:
    """y = f(x), in the dtype of x, and in its strides if they have neither gaps nor overlaps."""
    y = torch.empty_like(x)
    plan(name, 0, x.numel(), x.dtype, *parameters)(like(x, y), y)
    return y


def forward_(name: str, x: Tensor, *parameters: float) -> None:
    """y = f(x) over x."""
    if x.is_contiguous():
        plan(name, 0, x.numel(), x.dtype, *parameters)(x, x)
    else:
        x.copy_(forward(name, x, *parameters))


def backward(name: str, dy: Tensor, saved: Tensor, *parameters: float) -> Tensor:
    """dx = dy f'(saved), in the dtype and strides of ``saved``."""
    dx = torch.empty_like(saved)
    plan(name, 1, dx.numel(), dx.dtype, *parameters)(like(dy, dx), like(saved, dx), dx)
    return dx
