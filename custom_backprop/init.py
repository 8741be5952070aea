"""Initialisation that keeps the variance: one call for a network and its activation,
``torch.nn.init`` underneath.

A layer z' = W f(z) with independent weights of mean 0 has E z'² = fan_in · Var w · E f(z)². If z
has unit variance, so has z' just when

    Var w = g² / fan_in,    g = E[f(z)²]^(-1/2),  z ~ N(0, 1)

which is what :func:`gain` computes from the activation's own formula. Backward, δ = f'(z) Wᵀ δ' has
E δ² = fan_out · Var w · E f'(z)² · E δ'² (a convolution's fans: channels of one group, times the
size of the kernel). With this gain and fan_in = fan_out a gradient is multiplied, each layer, by b
= g E[f'(z)²]^(1/2). And a variance q next to 1 goes to 1 + s (q - 1), s = ½ g² E[f(z)² (z² - 1)]
(the density of variance q, differentiated by q): it comes back if s < 1, stays if s = 1, drifts
away if s > 1.

================  ======  ======  ======
activation         g       b       s
================  ======  ======  ======
linear            1.0000  1.0000  1.0000
relu              1.4142  1.0000  1.0000
relu6             1.4142  1.0000  1.0000
leaky_relu        1.4141  1.0000  1.0000
elu               1.2452  1.0178  0.8910
selu              1.0000  1.0352  0.7826
celu              1.2452  1.0178  0.8910
gelu              1.5335  1.0354  1.1441
gelu_tanh         1.5336  1.0354  1.1443
silu              1.6765  1.0328  1.1726
mish              1.4868  1.0291  1.0763
sigmoid           1.8462  0.3909  0.1063
logsigmoid        1.0419  0.5643  0.4921
hardsigmoid       1.8978  0.3159  0.0971
hardswish         1.7367  1.0399  1.2239
hardtanh          1.3920  1.1502  0.3851
tanh              1.5925  1.0853  0.4611
tanhshrink        2.3384  1.1762  1.8262
softplus          1.0419  0.5643  0.4921
softsign          2.3375  1.1154  0.4767
softshrink        1.5444  1.2131  1.4718
hardshrink        1.0158  0.7979  1.0454
relu_squared      0.8165  1.1547  2.0000
================  ======  ======  ======

A gradient keeps its length where b is 1; below it shrinks by b a layer, whatever the
initialisation: 20 layers of sigmoid leave b²⁰ of it. The first layer's input is data, f is not in
front of it: with inputs of unit variance its gain is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .formulas.activation import ACTIVATIONS
from .functional.linear import activation_parameters
from .nn import LinearActivation

__all__ = ["Propagation", "gain", "init_for", "propagation"]

Model = TypeVar("Model", bound=torch.nn.Module)
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
DRIFT = 1.15  # s above which no gain keeps the variance through 20 layers within a factor of ten


class Propagation(NamedTuple):
    """What one layer of an activation does to unit variance, under its gain."""

    gain: float
    gradient: float
    slope: float


@lru_cache(maxsize=64)
def _propagation(activation: str, parameters: tuple[float, ...]) -> Propagation:
    """The three integrals over the normal density by the trapezoidal rule, to about ten digits."""
    z = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    density /= density.sum()
    f = ACTIVATIONS[activation]
    y = f.value(z, *parameters)
    slope = f.derivative(y if f.saves_output else z, *parameters)

    square, squared_slope, drift = (
        torch.dot(density, x).item() for x in (y * y, slope * slope, y * y * (z * z - 1) / 2)
    )
    return Propagation(square**-0.5, math.sqrt(squared_slope / square), drift / square)


def propagation(activation: str, **parameters: float) -> Propagation:
    """g, b and s of the table above.

    Args:
        activation: "linear", or the name of an activation of :mod:`custom_backprop.functional`.
        parameters: the activation's own, such as ``negative_slope=0.1``.

    Raises:
        ValueError: no activation of that name.
        TypeError: it has no such parameter.
    """
    if activation == "linear" and not parameters:
        return Propagation(1.0, 1.0, 1.0)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"no activation {activation!r}: choose one of linear, {', '.join(ACTIVATIONS)}"
        )
    return _propagation(activation, activation_parameters(activation, parameters))


def gain(activation: str, **parameters: float) -> float:
    """g = E[f(z)²]^(-1/2) for z ~ N(0, 1): the standard deviation of √fan_in · w that keeps the
    variance.

    Arguments and errors: :func:`propagation`. For relu and leaky_relu it is
    ``torch.nn.init.calculate_gain``, which has 5/3 for tanh, 1 for sigmoid and 3/4 for selu: found
    in other ways, and keeping other things.
    """
    return propagation(activation, **parameters).gain


def init_for(
    model: Model,
    activation: str,
    method: str = "kaiming",
    *,
    batch: Any = None,
    generator: torch.Generator | None = None,
    **parameters: float,
) -> Model:
    """Draws the weights of a model anew, in place, such that unit variance passes through its
    depth; biases become 0.

    - ``kaiming``: Var w = g² / fan_in, normal. Keeps the variance forward, for any widths.
    - ``xavier``: Var w = 2 g² / (fan_in + fan_out), normal. The mean of what forward and backward
      ask for.
    - ``orthogonal``: WᵀW or WWᵀ = g² max(1, fan_out / fan_in). As kaiming, with no chance in the
      lengths: less drift.
    - ``lsuv``: orthogonal, then each layer's weight is divided by the deviation of its output on
      ``batch``. Needs no gain and no assumption.

    Linear layers and convolutions are drawn, ours (``LinearActivation``: one layer) and torch's, in
    the order of registration; all else is left. The groups of a convolution are drawn each by
    itself; a weight that several layers share is drawn, and scaled, once, for the first of them.

    Args:
        activation: what stands between the layers, as in :func:`gain`; where they are
            ``LinearActivation``, theirs.
        batch: inputs for ``lsuv``, of unit variance like what the model will be trained on; a tuple
            is taken as several arguments.
        generator: as in ``torch.nn.init``.
        parameters: the activation's own.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is not a module, or the activation has no such parameter.
        ValueError: no such activation or method; an activation that no gain carries through depth
            (s > 1.15), in a model that does not normalise; a ``LinearActivation`` of another one;
            no layer; a batch missing, unused, without variance, or that does not reach a layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"no method {method!r}: choose one of {', '.join(_METHODS)}")
    known = propagation(activation, **parameters)
    if (method == "lsuv") != (batch is not None):
        raise ValueError(
            "lsuv measures the layers' outputs: give it a batch"
            if batch is None
            else f"{method} takes no batch; lsuv does"
        )
    normalises = any("norm" in type(module).__name__.lower() for module in model.modules())
    if method != "lsuv" and known.slope > DRIFT and not normalises:
        raise ValueError(
            f"{activation}: a deviation of the variance grows {known.slope:.2f}-fold each layer, no gain keeps it through depth. "
            "Take method='lsuv', or normalise between the layers"
        )
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, LAYERS)
    }
    if not layers:
        raise ValueError("the model has no linear layer and no convolution")
    for name, layer in layers.items():
        if isinstance(layer, LinearActivation) and (
            layer.activation,
            layer.parameters_of_activation,
        ) != (activation, parameters):
            own = ", ".join(
                [
                    repr(layer.activation),
                    *(f"{k}={v}" for k, v in layer.parameters_of_activation.items()),
                ]
            )
            raise ValueError(
                f"layer {name!r} applies {own}, not {', '.join([repr(activation), *(f'{k}={v}' for k, v in parameters.items())])}"
            )
        if "weight" not in layer._parameters:
            raise ValueError(
                f"the weight of layer {name!r} is computed from others (a parametrization): draw it before that is registered"
            )
        if isinstance(layer.weight, torch.nn.parameter.UninitializedParameter):
            raise ValueError(
                f"layer {name!r} is lazy and has no shape yet: pass a batch through the model first"
            )
    drawn: set[int] = set()
    with torch.no_grad():
        for layer in layers.values():
            if id(layer.weight) not in drawn:
                groups = getattr(layer, "groups", 1)
                for block in layer.weight.chunk(groups) if groups > 1 else [layer.weight]:
                    _METHODS[method](block, known.gain if drawn else 1.0, generator)
            drawn.add(id(layer.weight))
            if layer.bias is not None:
                layer.bias.zero_()
        if method == "lsuv":
            _to_unit_variance(model, layers, batch if isinstance(batch, tuple) else (batch,))
    return model


def _kaiming(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    torch.nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator).mul_(gain)


def _xavier(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    torch.nn.init.xavier_normal_(weight, gain, generator)


def _orthogonal(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    """Where there are more rows than columns, W keeps the length of x, spread over more elements:
    the factor makes up for it.

    Decomposed in float32 at least, since torch decomposes nothing in half precision.
    """
    wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(
        torch.nn.init.orthogonal_(
            wide, gain * math.sqrt(max(1.0, len(weight) / weight[0].numel())), generator
        )
    )


_METHODS: dict[str, Callable[[Tensor, float, torch.Generator | None], None]] = {
    "kaiming": _kaiming,
    "xavier": _xavier,
    "orthogonal": _orthogonal,
    "lsuv": _orthogonal,
}


def _to_unit_variance(
    model: torch.nn.Module, layers: dict[str, Any], inputs: tuple[Any, ...]
) -> None:
    """One pass: as the batch arrives at a layer, its weight is divided by the deviation of W x, and
    what goes on is of the new weight.

    Buffers (running statistics) are put back afterwards.
    """
    left: dict[int, str] = {}  # by weight: the first layer that has it
    for name, layer in layers.items():
        left.setdefault(id(layer.weight), name)

    def scale(name: str, layer: Any, x: Tensor) -> None:
        if left.pop(id(layer.weight), None) is None:
            return  # a weight that is used again keeps the scale of its first use
        z = (
            F.linear(x, layer.weight)
            if isinstance(layer, torch.nn.Linear)
            else layer._conv_forward(x, layer.weight, None)
        )
        deviation = z.std()
        if not (deviation > 0 and deviation.isfinite()):
            raise ValueError(
                f"the output of layer {name!r} has the deviation {deviation.item():g} on this batch: it cannot be scaled"
            )
        layer.weight.div_(deviation)

    def watch(name: str, layer: Any) -> Any:
        return layer.register_forward_pre_hook(
            lambda layer, args, kwargs: scale(name, layer, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )

    hooks = [watch(name, layer) for name, layer in layers.items()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    if left:
        raise ValueError(
            f"the batch did not reach {', '.join(map(repr, left.values()))}: lsuv cannot scale what it does not see"
        )
