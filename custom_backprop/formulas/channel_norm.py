"""Group, instance and batch normalization of the channels of x (N, C, *), S the product of *.

Group normalization (Wu and He, 2018) cuts the C channels of each sample into G groups. With μ and
σ² the mean and the variance of the n = C / G · S numbers of a group,

    x̂ = r (x - μ), r = 1 / √(σ² + ε),   y = w x̂ + b,   w and b one number a channel.

That is layer normalization of a group's numbers, but for the weight. So its derivation holds
(``formulas/norm.py``): with g = w dy and sums over the group,

    dx = r (g - Σ g / n - x̂ Σ g x̂ / n),   dw = Σ dy x̂ and db = Σ dy over samples and *.

Here w is the same number all over a channel, which is why two sums a sample and channel are enough
for all three gradients: A = Σ dy x̂ and B = Σ dy over *. Then Σ g x̂ = Σ w A and Σ g = Σ w B over
the channels of the group, and dw = Σ A and db = Σ B over the samples.

Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016) has a group a channel. So has batch
normalization (Ioffe and Szegedy, 2015), of all samples, n = N S: here it is ``groups = 0``. Its
dx = w r (dy - db / n - x̂ dw / n) is written with dw and db.

In evaluation μ and σ² are running statistics, which are constants: dx = w r dy. They follow those
of the batches, σ² as the unbiased Σ (x - μ)² / (n - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen

Maybe = Tensor | None


def split(x: Tensor, groups: int) -> Tensor:
    """x as (N, groups, channels of a group, S)."""
    samples, channels = x.shape[:2]
    groups = groups or channels
    return x.reshape(samples, groups, channels // max(groups, 1), x.shape[2:].numel())


def over(groups: int) -> tuple[int, ...]:
    """The dimensions of that which a statistic is taken over."""
    return (2, 3) if groups else (0, 2, 3)


def count(x: Tensor, groups: int) -> int:
    """How many numbers a statistic is taken over."""
    return x.numel() // max(x.shape[0] * groups if groups else x.shape[1], 1)


def spread(t: Tensor, x: Tensor, groups: int = 0) -> Tensor:
    """What there is one of a group (N, groups) or a channel (C,), to be broadcast over x."""
    channels, rest = x.shape[1], (1,) * (x.dim() - 2)
    if groups:
        each = t.unsqueeze(2).expand(*t.shape, channels // groups)
        return each.reshape(t.shape[0], channels, *rest)
    return t.view(1, channels, *rest)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """μ and σ²; 0 of no numbers. The mean first, then the squares of what is left: nothing
    cancels."""
    x, n, dims = widen(x), max(count(x, groups), 1), over(groups)
    mean = split(x, groups).sum(dims) / n
    return mean, split(x - spread(mean, x, groups), groups).square().sum(dims) / n


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """μ and r."""
    mean, variance = moments(x, groups)
    return mean, (variance + eps).rsqrt()


def constants(mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """μ and r of running statistics."""
    return widen(mean), (widen(variance) + eps).rsqrt()


def unit(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """x̂."""
    return (widen(x) - spread(mean, x, groups)) * spread(rstd, x, groups)


def affine(x_hat: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    """w x̂ + b."""
    y = x_hat if weight is None else x_hat * spread(widen(weight), x_hat)
    return y if bias is None else y + spread(widen(bias), x_hat)


def dense(x: Tensor, like: Tensor) -> Tensor:
    """x without gaps in memory, its channels last if ``like`` is a picture whose are."""
    if like.dim() > 3 and not like.is_contiguous() and like.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def jacobian(t: Tensor, x_hat: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """∂x̂/∂x, which is symmetric, times t."""

    def mean(t: Tensor) -> Tensor:
        return spread(split(t, groups).mean(over(groups)), x_hat, groups)

    t = t - mean(t)
    return (t - x_hat * mean(t * x_hat)) * spread(rstd, x_hat, groups)


def group_norm(
    x: Tensor, weight: Maybe, bias: Maybe, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and of each group μ and r."""
    x = dense(x, x)
    mean, rstd = statistics(x, groups, eps)
    return affine(unit(x, mean, rstd, groups), weight, bias).to(x.dtype), mean, rstd


def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Maybe, mean: Tensor, rstd: Tensor, groups: int, *needs: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """dx, dw and db; None for each that is not needed."""
    return _backward(dy, x, weight, mean, rstd, groups, needs)


def batch_norm(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and of each channel μ, the unbiased variance and r."""
    x, n = dense(x, x), count(x, 0)
    mean, variance = moments(x, 0)
    rstd = (variance + eps).rsqrt()
    y = affine(unit(x, mean, rstd, 0), weight, bias).to(x.dtype)
    return y, mean, variance * (n / max(n - 1, 1)), rstd


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Maybe, mean: Tensor, rstd: Tensor, *needs: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """dx, dw and db; None for each that is not needed."""
    return _backward(dy, x, weight, mean, rstd, 0, needs)


def batch_norm_input(
    dy: Tensor, x: Tensor, weight: Maybe, mean: Tensor, rstd: Tensor, along: Tensor, total: Tensor
) -> Tensor:
    """dx, given Σ g x̂ / n and Σ g / n, which may be of more samples than there are here."""
    x, g = dense(x, x), affine(widen(dense(dy, x)), weight, None)
    g = g - spread(total, x) - unit(x, mean, rstd, 0) * spread(along, x)
    return (g * spread(rstd, x)).to(x.dtype)


def frozen_norm(
    x: Tensor, weight: Maybe, bias: Maybe, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """y where μ and σ² are constants."""
    x = dense(x, x)
    return affine(unit(x, *constants(mean, variance, eps), 0), weight, bias).to(x.dtype)


def frozen_norm_backward(
    dy: Tensor, x: Tensor, weight: Maybe, mean: Tensor, variance: Tensor, eps: float, *needs: bool
) -> tuple[Maybe, Maybe, Maybe]:
    """dx, dw and db; None for each that is not needed."""
    return _backward(dy, x, weight, *constants(mean, variance, eps), 0, needs, constant=True)


def _backward(dy, x, weight, mean, rstd, groups, needs, constant=False):
    need_x, need_weight, need_bias = needs
    x, dy = dense(x, x), widen(dense(dy, x))
    x_hat = unit(x, mean, rstd, groups)
    like = x if weight is None else weight
    dims = [d for d in range(x.dim()) if d != 1]
    dx = dw = db = None
    if need_x:
        g = affine(dy, weight, None)
        dx = g * spread(rstd, x) if constant else jacobian(g, x_hat, rstd, groups)
        dx = dx.to(x.dtype)
    if need_weight:
        dw = (dy * x_hat).sum(dims).to(like.dtype)
    if need_bias:
        db = dy.sum(dims).to(like.dtype)
    return dx, dw, db


def jvp(
    tx: Maybe, tw: Maybe, tb: Maybe, x: Tensor, weight: Maybe, mean: Tensor, rstd: Tensor,
    groups: int, constant: bool = False,
) -> Tensor:  # fmt: skip
    """ty = w ∂x̂/∂x tx + x̂ tw + tb."""
    x_hat = unit(x, mean, rstd, groups)
    ty = torch.zeros_like(x_hat)
    if tx is not None:
        ty = tx * spread(rstd, x) if constant else jacobian(tx, x_hat, rstd, groups)
    ty = affine(ty, weight, tb)
    return ty if tw is None else ty + affine(x_hat, tw, None)
