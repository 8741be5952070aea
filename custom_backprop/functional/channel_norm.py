"""Group, instance and batch normalization, as in ``torch.nn.functional``.

Derivations: :mod:`custom_backprop.formulas.channel_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.precision import wide, widen
from ..ops import channel_norm as ops
from ..ops.route import overridable
from .arguments import not_a_tensor, number

__all__ = ["batch_norm", "group_norm", "instance_norm"]

ONE_OF_TWO = "running_mean and running_var must either both be None or neither be None"


@overridable
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = w x̂ + b, x̂ = r (x - μ), a μ and 1/r² = σ² + ε for each channel;  dx = w r (dy - db / n -
    x̂ dw / n), dw = Σ dy x̂, db = Σ dy. In evaluation dx = w r dy.

    Args:
        input: (N, C, *), floating-point.
        running_mean, running_var: (C,). In training μ and σ² are those of the batch, and move these
            two, if they are given, by ``momentum`` towards themselves: running = (1 - momentum)
            running + momentum μ, and of σ² the unbiased one. In evaluation they are μ and σ².
        weight, bias: (C,); ones and zeros by default. Beside a half-precision input they and the
            running statistics may be float32.

    Raises:
        ValueError: one number a channel in training, an ``eps`` that is too small for it, or one
            running statistic without the other.
        RuntimeError: shapes or dtypes that do not fit, no running statistics in evaluation, or some
            that require grad.
        NotImplementedError: an input that is not floating-point.
        TypeError: something is not a tensor, or not a number.
    """
    if weight is None and bias is None and isinstance(input, Tensor) and input.shape == (0,):
        return input.clone()  # as stock does, though it has no channels
    check("batch_norm", input, weight, bias, running_mean, running_var)
    eps = eps if type(eps) is float else number("batch_norm", eps)
    momentum = momentum if type(momentum) is float else number("batch_norm", momentum)
    if training and input.numel() and input.numel() == input.shape[1]:
        raise ValueError(
            "batch_norm: expected more than 1 value per channel when training, got an input of "
            f"shape {tuple(input.shape)}"
        )
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be positive, in evaluation at least 0, got {eps}")
    if not training:
        if running_mean is None or running_var is None:
            which = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"batch_norm: {which} must be defined in evaluation mode")
        return ops.frozen_norm(input, weight, bias, running_mean, running_var, eps)
    if (running_mean is None) != (running_var is None):
        raise ValueError(ONE_OF_TWO)
    y, *found = ops.batch_norm(input, weight, bias, eps)
    if running_mean is not None and input.numel():
        move((running_mean, running_var), found, momentum)
    return y


@overridable
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = w x̂ + b, x̂ = r (x - μ), μ the mean and 1/r² the variance + ε of a group of channels of
    one sample;  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂, db = Σ dy.

    Args:
        input: (N, C, *), floating-point.
        num_groups: groups of C / num_groups channels.
        weight, bias: (C,); ones and zeros by default. Beside a half-precision input they may be
            float32.

    Raises:
        ValueError: there is one number in all groups together.
        RuntimeError: shapes or dtypes that do not fit, or no such ``num_groups``.
        NotImplementedError: an input that is not floating-point.
        TypeError: something is not a tensor, or not a number.
    """
    if isinstance(input, Tensor) and input.dim() < 2:
        raise RuntimeError(f"group_norm: expected an input (N, C, *), got {tuple(input.shape)}")
    check("group_norm", input, weight, bias, None, None)
    if not isinstance(num_groups, int):
        raise TypeError(f"group_norm: num_groups must be an int, not {type(num_groups).__name__}")
    if num_groups <= 0 or input.shape[1] % num_groups:
        raise RuntimeError(
            f"group_norm: expected a number of channels that num_groups={num_groups} divides, got "
            f"an input of shape {tuple(input.shape)}"
        )
    if input.numel() and input.numel() == num_groups:
        raise ValueError(
            "group_norm: expected more than 1 value per channel when training, got an input of "
            f"shape {tuple(input.shape)}"
        )
    eps = eps if type(eps) is float else number("group_norm", eps)
    return ops.group_norm(input, weight, bias, num_groups, eps)


@overridable
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`group_norm` with a group for each channel.

    Args:
        input: (N, C, *), floating-point.
        running_mean, running_var: (C,). With ``use_input_stats`` they move by ``momentum`` towards
            the mean over samples of μ and the unbiased σ²; without it they are μ and σ².
        weight, bias: as of :func:`group_norm`.

    Raises:
        ValueError: one number a channel, whose statistics are wanted; or one running statistic
            without the other.
        RuntimeError: shapes or dtypes that do not fit, running statistics that are wanted and not
            there, or some that require grad.
        NotImplementedError, TypeError: as of :func:`group_norm`.
    """
    if isinstance(input, Tensor) and use_input_stats and input.shape[2:].numel() == 1:
        raise ValueError(
            "instance_norm: expected more than 1 spatial element when training, got an input of "
            f"shape {tuple(input.shape)}"
        )
    check("instance_norm", input, weight, bias, running_mean, running_var)
    eps = eps if type(eps) is float else number("instance_norm", eps)
    momentum = momentum if type(momentum) is float else number("instance_norm", momentum)
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if (running_mean is None) != (running_var is None):
        raise ValueError(ONE_OF_TWO)
    if running_mean is None:
        return ops.instance_norm(input, weight, bias, input.shape[1], eps)
    running = running_mean, running_var
    return _instances_as_batch(input, running, weight, bias, momentum, eps)


def move(running, found, momentum):
    """Running statistics towards those that were found. No gradient flows into them."""
    for old, each in zip(running, found, strict=True):
        new = each.detach()  # also from forward mode
        if old.dtype == new.dtype:
            old.lerp_(new, momentum)
        else:  # half precision, rounded once
            old.copy_(widen(old).lerp(new, momentum))


def _instances_as_batch(x, running, weight, bias, momentum, eps):
    """instance_norm that moves running statistics: a channel of each sample is one of a batch of
    one, and what would be its running statistics are averaged."""
    samples, channels = x.shape[:2]
    mean, variance = (t.repeat(samples) for t in running)
    w, b = (None if t is None else t.repeat(samples) for t in (weight, bias))
    batch = x.reshape(1, samples * channels, *x.shape[2:])
    y = batch_norm(batch, mean, variance, w, b, True, momentum, eps).reshape(x.shape)
    if x.numel():
        for old, new in zip(running, (mean, variance), strict=True):
            old.copy_(torch.mean(new.view(samples, channels), 0))
    return y


def check(name, x, weight, bias, mean, variance):
    """Raises what stock raises of tensors that do not fit."""
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, "input", x)
    if x.dim() < 2:
        raise IndexError(f"{name}: expected an input (N, C, *), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"{name} is not implemented for {x.dtype}")
    expected, dtype = x.shape[1:2], x.dtype
    given = ("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", variance)
    for which, t in given:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise not_a_tensor(name, which, t)
        if t.shape != expected:
            raise RuntimeError(
                f"{name}: {which} should contain {x.shape[1]} elements, one a channel of an input "
                f"of shape {tuple(x.shape)}, got shape {tuple(t.shape)}"
            )
        if t.dtype != dtype and t.dtype != wide(dtype):
            raise RuntimeError(
                f"{name}: expected a {which} of the dtype of the input, {dtype}, got {t.dtype}"
            )
        if t.requires_grad and (t is mean or t is variance):
            raise RuntimeError(f"{name} is not differentiable with respect to {which}")
