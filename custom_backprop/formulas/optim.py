"""Update rules: what an optimizer does with the gradient g of one parameter θ at step t.

A rule is a pure function ``rule(θ, g, **state, t, **hyperparameters) -> (θ', {name: state'})`` of
tensors of the same shape. It is elementwise, so it is also right for a shard, or for a thousand
concatenated parameters. Names and defaults are torch.optim's. In all of them γ is the learning rate
``lr``, λ is ``weight_decay``, and with ``maximize`` g stands for -g. They share three operations:

    weight decay, coupled     g ← g + λ θ           the gradient of ½ λ ‖θ‖² is added to g
    weight decay, decoupled   θ ← θ - γ λ θ         θ shrinks without g (Loshchilov & Hutter,
                                                    "Decoupled weight decay", 2019)
    a running average         m ← β m + (1 - β) g   of about the last 1 / (1 - β) gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

Update = tuple[Tensor, dict[str, Tensor]]


def sgd(
    p: Tensor,
    g: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    fresh: bool = False,
) -> Update:
    """θ ← θ - γ b,  b ← μ b + (1 - τ) g  (b = g in the first step, ``fresh``, and always if μ = 0).

    The momentum μ sums the gradients of about the last 1 / (1 - μ) steps, like a ball that rolls
    down (Polyak, 1964). Nesterov steps by g + μ b, the gradient one step ahead (Sutskever et al.,
    "On the importance of initialization and momentum in deep learning", 2013).
    """
    g = coupled(p, -g if maximize else g, weight_decay)
    if momentum == 0:
        return p - lr * g, {}
    assert momentum_buffer is not None
    b = g.clone() if fresh else momentum * momentum_buffer + (1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b), {"momentum_buffer": b}


def adagrad(
    p: Tensor,
    g: Tensor,
    sum: Tensor,
    *,
    t: float,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Update:
    """s ← s + g²,  θ ← θ - γ / (1 + (t - 1) η) · g / (√s + ε).

    Each element has its own rate, which falls with the gradients that it has seen, so that of a
    rare feature stays large (Duchi et al., "Adaptive subgradient methods for online learning and
    stochastic optimization", 2011).
    """
    g = coupled(p, -g if maximize else g, weight_decay)
    s = sum + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (s.sqrt() + eps), {"sum": s}


def rmsprop(
    p: Tensor,
    g: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None = None,
    grad_avg: Tensor | None = None,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Update:
    """v ← α v + (1 - α) g²,  u = g / (√v + ε),  b ← μ b + u,  θ ← θ - γ b  (b = u if μ = 0).

    Adagrad's sum is replaced by a running average, so that the rate does not fall forever (Tieleman
    & Hinton, lecture 6.5, 2012). ``centered`` uses the variance v - a² instead of v, with a ← α a +
    (1 - α) g (Graves, "Generating sequences with recurrent neural networks", 2013).
    """
    g = coupled(p, -g if maximize else g, weight_decay)
    state = {"square_avg": alpha * square_avg + (1 - alpha) * g * g}
    v = state["square_avg"]
    if centered:
        assert grad_avg is not None
        state["grad_avg"] = a = average(grad_avg, g, alpha)
        v = v - a * a
    u = g / (v.sqrt() + eps)
    if momentum > 0:
        assert momentum_buffer is not None
        state["momentum_buffer"] = u = momentum * momentum_buffer + u
    return p - lr * u, state


def adam(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    t: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Update:
    """m ← β₁ m + (1 - β₁) g,  v ← β₂ v + (1 - β₂) g²,  θ ← θ - γ m̂ / (√v̂ + ε)  with  m̂ = m / (1
    - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ).

    m and v start at 0: after t steps they are 1 - βᵗ times an average, and m̂ and v̂ divide by that
    (Kingma & Ba, "Adam: a method for stochastic optimization", 2015). ``amsgrad`` uses the largest
    v so far (Reddi et al., "On the convergence of Adam and beyond", 2018).
    ``decoupled_weight_decay`` makes it AdamW.
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = coupled(p, g, weight_decay)
    m, v = average(exp_avg, g, beta1), beta2 * exp_avg_sq + (1 - beta2) * g * g
    state = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        assert max_exp_avg_sq is not None
        state["max_exp_avg_sq"] = v = torch.maximum(max_exp_avg_sq, v)
    return p - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps), state


def lion(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Update:
    """θ ← θ - γ λ θ - γ sign(β₁ m + (1 - β₁) g),  m ← β₂ m + (1 - β₂) g.

    Every element moves by γ, whatever the size of its gradient: choose γ 3 to 10 times smaller than
    AdamW's, and λ larger by the same factor (Chen et al., "Symbolic discovery of optimization
    algorithms", 2023).
    """
    g = -g if maximize else g
    return p - lr * weight_decay * p - lr * average(exp_avg, g, betas[0]).sign(), {
        "exp_avg": average(exp_avg, g, betas[1])
    }


def coupled(p: Tensor, g: Tensor, weight_decay: float) -> Tensor:
    """g + λ θ."""
    return g + weight_decay * p if weight_decay else g


def average(m: Tensor, g: Tensor, beta: float) -> Tensor:
    """β m + (1 - β) g, which is exactly m if g equals m."""
    return m + (1 - beta) * (g - m)


def clip_factor(total_norm: Tensor, max_norm: float) -> Tensor:
    """min(1, c / (n + 1e-6)): the factor by which clip_grad_norm_ multiplies every gradient, if all
    of them together have the norm n."""
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)


def stochastically_rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds float32 ``x`` to one of its two neighbours in bfloat16, more likely to the nearer one,
    so that the mean of many roundings is x.

    bfloat16 is the upper half of float32's bits. Uniform ``noise`` (int32, 0 to 65535), added to
    the lower half, carries into the upper one with the probability lower / 65536. Rounding to
    nearest would lose an update of less than half a spacing in every step. Infinities and NaN,
    which have no neighbours, do not change.
    """
    bits = (x.view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()
