"""Dropout: each element is kept with probability q = 1 - p, and the mean stays what it was.

With m_i = 1 where element i is kept, else 0:

    y = m x / q,   dx = m dy / q,

because E[m] = q (Srivastava et al., 2014). The operation is linear in x and multiplies each element
by itself, so that it is its own adjoint: backward is forward of dy with the same m.

**Alpha dropout** (Klambauer et al., 2017) drops to -α, the value that selu saturates at, α = 1.758.
If x has mean 0 and variance 1, z = m x - (1 - m) α has

    E[z] = -p α,   Var[z] = q + p α² - p² α² = q (1 + p α²),

and y = a z + b has mean 0 and variance 1 again where a = (q (1 + p α²))^(-1/2) and b = a p α:

    y = m a x + (b where kept, else b - a α),   dx = m a dy.

**The mask** is not stored. It is a function of a seed and of the number i of an element, counted
along the rows: m_i = [w_i >= p 2^32], where the words w are random numbers of 32 bits. Philox 4x32
makes four of them from a counter, with the seed as its key: word i is number i mod 4 of those of
counter i // 4. So any element's word is computed by itself, in any order: on every device, in
kernels and in compiled code alike. It takes seven rounds, the fewest with which Philox 4x32 passes
all tests of BigCrush; the ten that are its default leave a margin, and take a third longer (Salmon
et al., Parallel random numbers: as easy as 1, 2, 3, 2011). On a CPU its 64-bit products, written as
torch operators, take longer than all else; where nobody needs one word by itself, they are those of
numpy's SFC64 instead, drawn in order (``philox=False``).
"""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from .precision import wide

#: -selu(-∞)
ALPHA = 1.7580993408473766

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 7


def threshold(p: float) -> int:
    """A word below it drops its element."""
    return min(round(p * 2**32), _LOW)


def coefficients(p: float, alpha: bool) -> tuple[float, float, float]:
    """(factor of what is kept, what is added to it, what is added to the dropped)."""
    if p == 1:
        return 0.0, 0.0, 0.0
    if not alpha:
        return 1 / (1 - p), 0.0, 0.0
    a = 1 / math.sqrt((1 - p) * (1 + p * ALPHA**2))
    return a, a * p * ALPHA, a * (p - 1) * ALPHA


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter, as int64 in [0, 2^32). ``seed`` has one element, of int64.

    A product of two words wraps around in int64, where its halves are right all the same. What is
    above 32 bits is cut off where it would reach a product or a shift. Memory is written over where
    it can be: to allocate it would take as long as to compute.
    """
    counter = counter + seed * 0  # vmap may give each sample a seed
    c0, c1, c2, c3 = counter & _LOW, counter >> 32, counter * 0, counter * 0
    k0, k1 = seed, seed >> 32
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = (first >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = second, first
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1 & _LOW, c2, c3 & _LOW


def drawn(generator: numpy.random.BitGenerator, count: int) -> Tensor:
    """The next ``count`` words less 2^31, as int32. Of an odd count, half a draw is lost."""
    return torch.from_numpy(generator.random_raw(-(-count // 2)).view(numpy.int32))[:count]


def kept(seed: Tensor, count: int, p: float, by_philox: bool = True) -> Tensor:
    """Which of ``count`` elements are kept, as a flat tensor of bool."""
    if not by_philox:
        return drawn(numpy.random.SFC64(int(seed)), count) >= threshold(p) - 2**31
    counter = torch.arange(-(-count // 4), device=seed.device)
    words = torch.stack(philox(seed, counter), -1)
    return words.flatten()[:count] >= threshold(p)


def mask(seed: Tensor, shape: torch.Size, p: float, features: bool, by_philox: bool) -> Tensor:
    """m of a tensor of ``shape``: of each element, or for ``features`` of each (i, j)."""
    own = shape[:2] if features else shape
    m = kept(seed, own.numel(), p, by_philox)
    return m.view((*own, *[1] * (len(shape) - len(own))))


def dropout(
    x: Tensor, residual: Tensor | None, seed: Tensor, p: float, alpha: bool, features: bool,
    by_philox: bool,
) -> Tensor:  # fmt: skip
    """y, or residual + y, with the strides of x if it is dense."""
    scale, add, instead = coefficients(p, alpha)
    m = mask(seed, x.shape, p, features, by_philox).to(wide(x.dtype))
    y = x.to(m.dtype) * (m * scale)
    if alpha:
        y = y + (m * add + (1 - m) * instead)
    return (y if residual is None else y + residual).to(result_type(x, residual))


def dropout_backward(
    dy: Tensor, seed: Tensor, p: float, alpha: bool, features: bool, by_philox: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dx, with the strides of dy if it is dense."""
    m = mask(seed, dy.shape, p, features, by_philox).to(wide(dy.dtype))
    return (dy.to(m.dtype) * (m * coefficients(p, alpha)[0])).to(dtype)


def result_type(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """That of y."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
