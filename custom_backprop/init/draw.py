"""Drawing the weights of a network, for its activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn import LinearActivation
from .propagation import propagation

Model = TypeVar("Model", bound=torch.nn.Module)
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
#: above this s, no gain preserves the variance within a factor of ten through 20 layers
DRIFT = 1.15


def init_for(
    model: Model,
    activation: str,
    method: str = "kaiming",
    *,
    batch: Any = None,
    generator: torch.Generator | None = None,
    **parameters: float,
) -> Model:
    """Draws the weights of a model again, in place, so that all layers have outputs of unit
    variance. Biases become 0.

    - ``kaiming``: Var w = g² / fan_in, normal. Preserves the variance forward, for any widths.
    - ``xavier``: Var w = 2 g² / (fan_in + fan_out), normal. The mean of what forward and backward
      need.
    - ``orthogonal``: WᵀW or WWᵀ = g² max(1, fan_out / fan_in). As kaiming, without randomness in
      the lengths: less drift.
    - ``lsuv``: orthogonal, then each layer's weight is divided by the standard deviation of its
      output on ``batch``. Needs no gain and no assumption.

    It draws linear layers and convolutions, ours (``LinearActivation`` is one layer) and torch's,
    in the order of registration, and nothing else. It draws each group of a convolution separately.
    It draws and scales a weight that several layers share once, for the first of them.

    Args:
        activation: the activation between the layers, as in :func:`gain`; for ``LinearActivation``,
            the layers' own.
        batch: inputs for ``lsuv``, of unit variance, like those the model will be trained on. A
            tuple is passed as several arguments.
        generator: as in ``torch.nn.init``.
        parameters: the activation's own.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is not a module, or the activation has no such parameter.
        ValueError: there is no such activation or method; no gain is stable for the activation (s >
            1.15), and the model does not normalise; a ``LinearActivation`` has another activation;
            there is no layer; the batch is missing, unused, without variance, or does not reach a
            layer.
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
            else f"{method} takes no batch, only lsuv does"
        )
    normalises = any("norm" in type(module).__name__.lower() for module in model.modules())
    if method != "lsuv" and known.slope > DRIFT and not normalises:
        raise ValueError(
            f"{activation}: a deviation of the variance grows {known.slope:.2f}-fold in each "
            "layer, with any gain. Use method='lsuv', or normalise between the layers"
        )
    layers = {n: module for n, module in model.named_modules() if isinstance(module, LAYERS)}
    if not layers:
        raise ValueError("the model has no linear layer and no convolution")
    for name, layer in layers.items():
        _refuse(name, layer, activation, parameters)
    with torch.no_grad():
        _draw(layers.values(), method, known.gain, generator)
        if method == "lsuv":
            _to_unit_variance(model, layers, batch if isinstance(batch, tuple) else (batch,))
    return model


def _refuse(name: str, layer: Any, activation: str, parameters: dict[str, float]) -> None:
    """Raises ValueError for a layer whose weight cannot be drawn for this activation."""
    if isinstance(layer, LinearActivation):
        own = layer.activation, layer.parameters_of_activation
        if own != (activation, parameters):
            asked = _spelled(activation, parameters)
            raise ValueError(f"layer {name!r} applies {_spelled(*own)}, not {asked}")
    if "weight" not in layer._parameters:
        raise ValueError(
            f"the weight of layer {name!r} is computed from others (a parametrization): "
            "draw it before that is registered"
        )
    if isinstance(layer.weight, torch.nn.parameter.UninitializedParameter):
        raise ValueError(
            f"layer {name!r} is lazy and has no shape yet: pass a batch through the model first"
        )


def _spelled(activation: str, parameters: dict[str, float]) -> str:
    return ", ".join([repr(activation), *(f"{k}={v}" for k, v in parameters.items())])


def _draw(
    layers: Iterable[Any], method: str, gain: float, generator: torch.Generator | None
) -> None:
    """Draws each weight once, the first with gain 1, and each group of a convolution separately."""
    drawn: set[int] = set()
    for layer in layers:
        if id(layer.weight) not in drawn:
            groups = getattr(layer, "groups", 1)
            for block in layer.weight.chunk(groups) if groups > 1 else [layer.weight]:
                _METHODS[method](block, gain if drawn else 1.0, generator)
        drawn.add(id(layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()


def _kaiming(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    torch.nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator).mul_(gain)


def _xavier(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    torch.nn.init.xavier_normal_(weight, gain, generator)


def _orthogonal(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    """If there are more rows than columns, W x has the length of x but more elements. The factor
    compensates for that.

    The decomposition is in float32 at least, since torch has none in half precision.
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
    """Needs one pass: when the batch reaches a layer, its weight is divided by the standard
    deviation of W x, and the pass continues with the new weight.

    Buffers (running statistics) are restored afterwards.
    """
    left: dict[int, str] = {}  # for each weight: the first layer that has it
    for name, layer in layers.items():
        left.setdefault(id(layer.weight), name)

    def scale(name: str, layer: Any, x: Tensor) -> None:
        if left.pop(id(layer.weight), None) is None:
            return  # a shared weight was scaled at its first use
        z = (
            F.linear(x, layer.weight)
            if isinstance(layer, torch.nn.Linear)
            else layer._conv_forward(x, layer.weight, None)
        )
        deviation = z.std()
        if not (deviation > 0 and deviation.isfinite()):
            raise ValueError(
                f"the output of layer {name!r} has the deviation {deviation.item():g} on this "
                "batch: it cannot be scaled"
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
            f"the batch did not reach {', '.join(map(repr, left.values()))}: "
            "lsuv cannot scale what it does not see"
        )
