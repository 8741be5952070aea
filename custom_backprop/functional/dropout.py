"""Dropout, with the names and signatures of ``torch.nn.functional``.

No mask is stored. A call draws one seed from torch's generator of the tensor's device, and backward
makes the same mask from it again. So ``torch.manual_seed``, ``torch.random.fork_rng`` and
``torch.utils.checkpoint`` reproduce a mask, which is not the mask of stock; ``vmap`` draws one seed
for all samples or one each, or raises, as its ``randomness`` says; and a CUDA graph draws another
at each replay.

Args:
    input: a floating-point tensor. Any other gives what stock gives.
    p: the probability of a zero, in [0, 1]. It is met to within 2^-32.
    training: if false, or if p is 0 or ``input`` is empty, ``input`` itself is returned.
    inplace: write the result over ``input``.
    seed: an int64 tensor of one element, on the device of ``input``. The mask then depends on it
        alone, and is the same on every device, in eager and in compiled code. Default: drawn; on a
        CPU eager code then makes the mask in a quicker way, so that it is another.

Raises:
    ValueError: ``p`` is not in [0, 1].
    TypeError: ``input`` is not a tensor.
    RuntimeError: too few or too many dimensions; a ``seed`` of another dtype, size or device; or
        ``inplace=True`` for a leaf that requires grad.

Derivation: :mod:`custom_backprop.formulas.dropout`.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.selection import TENSORS, backend_for, is_traced, is_transformed
from ..dtensor import is_dtensor
from ..ops import dropout as ops
from ..ops.route import overridable
from .arguments import SEEDS, gains_on_a_cpu, no_seed, not_tensors

__all__ = [
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "feature_alpha_dropout",
]


@gains_on_a_cpu
@overridable
def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = m x / (1 - p);  dx = m dy / (1 - p), where each m is 0 with probability p, else 1."""
    return _drop("dropout", input, p, training, inplace, seed, False, False)


@gains_on_a_cpu
@overridable
def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = a (m x - (1 - m) α) + a p α;  dx = m a dy, which keeps mean 0 and variance 1."""
    return _drop("alpha_dropout", input, p, training, inplace, seed, True, False)


@overridable
def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`alpha_dropout` with one m for each channel ``input[i, j]``."""
    return _drop("feature_alpha_dropout", input, p, training, inplace, seed, True, True)


@overridable
def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`dropout` with one m for each channel of (N, C, L) or (C, L)."""
    if isinstance(input, Tensor) and input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: expected (N, C, L) or (C, L), got {tuple(input.shape)}")
    return _drop("dropout1d", input, p, training, inplace, seed, False, True, input.dim() == 2)


@overridable
def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`dropout` with one m for each channel of (N, C, H, W). As in torch, three dimensions
    are (N, C, L), with a warning."""
    if isinstance(input, Tensor) and input.dim() != 4:
        _warn("dropout2d", input, "as (N, C, ...); dropout1d takes (N, C, L)")
    return _drop("dropout2d", input, p, training, inplace, seed, False, True)


@overridable
def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`dropout` with one m for each channel of (N, C, D, H, W) or (C, D, H, W)."""
    if isinstance(input, Tensor) and input.dim() not in (4, 5):
        _warn("dropout3d", input, "as (C, ...)")
    return _drop("dropout3d", input, p, training, inplace, seed, False, True, input.dim() != 5)


@gains_on_a_cpu
@overridable
def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = r + m x / (1 - p);  dx = m dy / (1 - p), dr = dy, in one pass.

    Args:
        residual: r, of the shape of ``input``. The dtype of y is that of r + x.

    Raises:
        RuntimeError: the shapes differ.
    """
    if not isinstance(residual, Tensor):
        raise not_tensors("dropout_add", input, residual)
    return _drop("dropout_add", input, p, training, False, seed, False, False, residual=residual)


def _drop(name, x, p, training, inplace, seed, alpha, features, unbatched=False, residual=None):
    if not isinstance(x, Tensor):
        raise not_tensors(name, x)
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: p has to be between 0 and 1, but got {p}")
    if seed is not None and (seed.dtype, seed.numel(), seed.device) != (torch.int64, 1, x.device):
        raise no_seed(name, x, seed)
    if residual is not None and residual.shape != x.shape:
        raise RuntimeError(
            f"{name}: the input and the residual must have one shape, got {tuple(x.shape)} and "
            f"{tuple(residual.shape)}"
        )
    if not training or p == 0 or not x.numel():
        return x if residual is None else residual + x
    if features and x.dim() + unbatched < 2:
        raise RuntimeError(f"{name}: expected at least 2 dimensions, got {tuple(x.shape)}")
    # DTensor has generators of its own
    if not x.is_floating_point() or x.is_nested or (seed is None and is_dtensor(x)):
        if residual is not None:
            return residual + F.dropout(x, p)
        return getattr(F, name)(x, p, training, inplace)
    drawn, philox = (seed, True) if seed is not None else _draw(x)
    given = x.unsqueeze(0) if unbatched else x
    y = ops.dropout(given, residual, drawn, float(p), alpha, features, philox)
    y = y.squeeze(0) if unbatched else y
    return x.copy_(y) if inplace else y


def _draw(x):
    """A seed, and whether the mask is made of it by Philox."""
    eager = x.is_cpu and type(x) in TENSORS and not is_traced() and not is_transformed()
    seed = torch.randint(SEEDS, (), device=x.device)
    return seed, not (eager and backend_for("cpu") == "aten")


def _warn(name, x, what):
    warnings.warn(
        f"{name}: an input of {x.dim()} dimensions, {tuple(x.shape)}, is taken {what}; this is "
        "deprecated in torch",
        stacklevel=4,
    )
