"""``linear_cross_entropy``, with the signature of ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..backends.selection import TENSORS, is_autocast, is_traced, is_transformed
from ..ops import linear_cross_entropy as ops
from ..ops.route import overridable
from .arguments import (
    cast_to_one_dtype,
    check_classes,
    check_weight,
    gains_on_a_cpu,
    not_tensors,
)

__all__ = ["linear_cross_entropy"]


@gains_on_a_cpu
@overridable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    return_z_loss: bool = False,
    return_log_probs: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """Cross-entropy of a linear layer's logits, of which memory sees a chunk of rows at a time:
    L_r = ω_r (Σ_c q_rc (lse_r - l_rc) + ζ lse_r²), l = s(x Wᵀ + b), lse_r = log Σ_c e^(l_rc);
    dl_rc = dy_r ω_r (p_rc Σ_c q_rc - q_rc + 2 ζ lse_r p_rc), dz = dl s', dx = dz W, dW = dzᵀ x,
    db = Σ_r dz, with p = softmax(l).

    Where a scalar loss is differentiated, forward makes the gradients that are wanted, and no
    others. dW and db are summed over the chunks in float32 or wider. Unlike stock's chunked form,
    every derivative and transformation is supported, and the graph may be retained.

    Args:
        input: (H) or (N, H), floating-point.
        linear_weight: (C, H) for C classes; or (C, d1, ..., dK, H), for an ``input`` (N, H): a
            prediction for each of d1, ..., dK.
        target: classes of shape (), (N) or (N, d1, ..., dK), int64, or uint8 without d1, ..., dK.
            Or probabilities of shape (C), (N, C) or (N, C, d1, ..., dK), differentiated too.
        linear_bias: (C) or (C, d1, ..., dK).
        weight: (C), a factor of each class in q, as in :func:`cross_entropy`.
        reduction: "none", "mean" or "sum". The mean is Σ L_r / Σ ω_r w_t; for probabilities
            Σ L_r / Σ ω_r.
        ignore_index: the class whose rows count for nothing, -100 by default.
        label_smoothing: as in :func:`cross_entropy`.
        options: torch's ``LinearCrossEntropyOptions``. Its ``batch_chunk_size`` is another way to
            give ``chunk_size``. Its other fields choose between accuracy and memory, or allow to
            retain the graph; here results are accurate in little memory, and the graph may be
            retained.
        token_weight: ω, of the shape of the loss with reduction "none". It has no gradient.
        softcap: c of s(z) = c tanh(z/c), greater than 0; s(z) = z by default.
        z_loss: ζ, at least 0.
        chunk_size: how many rows of logits memory sees at a time. By default
            :func:`custom_backprop.backends.linear_cross_entropy.rows_of_chunk` decides.
        return_z_loss: also returns the part of the loss that is z-loss, reduced in the same way.
        return_log_probs: also returns log p_rt of each row, 0 where it is ignored; for classes.
        dtype: of the results. By default that of stock's loss of such logits: the input's; float32
            under autocast.

    Returns:
        The loss; or a tuple of it and what else is asked for, in this order. All are
        differentiable.

    Raises:
        IndexError: a class out of range, on a CPU. On a GPU, where to look is to wait, the loss is
            NaN.
        ValueError: an unknown reduction, a batch size that does not fit, a ``softcap``,
            ``z_loss`` or ``chunk_size`` out of range, ``return_log_probs`` of probabilities.
        RuntimeError: other shapes, dtypes or devices that do not fit, a weight that requires grad,
            ``label_smoothing`` above 1, ``ignore_index`` beside probabilities.
        TypeError: something is not a tensor.
    """
    number = _Reduction.get_enum(reduction)
    _check_layer(input, linear_weight, target, linear_bias)
    rows, outer = input.shape[:-1], linear_weight.shape[1:-1]
    probabilities = target.shape == (*rows, linear_weight.shape[0], *outer)
    if weight is not None or token_weight is not None or not _is_common(input, target, outer):
        _check_rest(input, linear_weight, target, weight, token_weight, ignore_index, probabilities)
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap must be greater than 0, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss must be at least 0, got {z_loss}")
    chunk = chunk_size if options is None else chunk_size or options.batch_chunk_size
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be at least 1, got {chunk}")
    if return_log_probs and probabilities:
        raise ValueError("linear_cross_entropy: return_log_probs needs classes as targets")
    if input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
        token_weight = None if token_weight is None else token_weight.unsqueeze(0)
    if len(outer) > 1:
        linear_weight = linear_weight.flatten(1, -2)
        linear_bias = None if linear_bias is None else linear_bias.flatten(1)
        target = target.flatten(2 if probabilities else 1)
        token_weight = None if token_weight is None else token_weight.flatten(1)
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    if probabilities and weight is not None and weight.requires_grad:
        of_class = weight.view(-1, *[1] * (target.dim() - 2))
        target = of_class * ((1 - smoothing) * target + smoothing / weight.numel())
        weight, smoothing = None, 0.0
    product = input.dtype
    found_in = torch.promote_types(product, target.dtype) if probabilities else product
    if is_autocast(input) and product != torch.float64:
        product = torch.get_autocast_dtype(input.device.type)
        found_in = torch.promote_types(found_in, torch.float32)
    in_parts = return_z_loss or return_log_probs
    ignored = -100 if ignore_index is None else ignore_index
    told_by_row = return_log_probs or token_weight is not None or not number
    plain = not (probabilities or outer or told_by_row)
    if plain and input.is_cpu and len(input) * len(linear_weight) >= MANY:
        input, target = _rows_that_count(input, target, ignored)
    found = ops.linear_cross_entropy(
        input,
        linear_weight,
        target.long() if target.dtype == torch.uint8 else target,
        linear_bias,
        in_parts,
        weight,
        token_weight,
        number,
        ignored,
        smoothing,
        float(softcap or 0.0),
        float(z_loss),
        chunk or 0,
        product,
        return_log_probs,
        dtype or found_in,
    )
    shape = (*rows, *outer)
    if not in_parts:
        return found if not found.dim() or found.shape == shape else found.view(shape)
    loss, z, log_p = (t if not t.dim() or not t.numel() else t.view(shape) for t in found)
    return loss, *([z] if return_z_loss else []), *([log_p] if return_log_probs else [])


#: from so many logits on, rows are counted that a loss ignores; on a GPU to count is to wait
MANY = 2**18


def _rows_that_count(input: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The rows whose class is not ignored, if they are few: of a masked language model, a
    seventh."""
    if type(input) in TENSORS and not (is_traced() or is_transformed()):
        counts = target != ignored
        if 4 * counts.sum() < 3 * len(input):
            return input[counts], target[counts]
    return input, target


def _is_common(input: Tensor, target: Tensor, outer: torch.Size) -> bool:
    """Whether these are rows of one class each, as nearly always: then nothing else is left to
    check."""
    return (
        target.dtype is torch.int64
        and target.shape == input.shape[:-1]
        and len(target.shape) == 1
        and not outer
        and input.device == target.device
    )


def _check_layer(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None
) -> None:
    """Raises what stock raises for a layer and an input that do not fit."""
    name = "linear_cross_entropy"
    given = [input, linear_weight, *([] if linear_bias is None else [linear_bias])]
    if not all(isinstance(t, Tensor) for t in (*given, target)):
        raise not_tensors(name, *given, target)
    shapes = f"{tuple(input.shape)} and a weight of shape {tuple(linear_weight.shape)}"
    if (
        input.dim() not in (1, 2)
        or linear_weight.dim() < 2
        or input.shape[-1] != linear_weight.shape[-1]
    ):
        raise RuntimeError(
            f"{name}: expected an input (H) or (N, H) and a weight (C, H) or (C, d1, ..., dK, H), "
            f"got an input of shape {shapes}"
        )
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise RuntimeError(
            f"{name}: a weight (C, d1, ..., dK, H) takes an input (N, H), got an input of shape "
            f"{shapes}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"{name}: expected a bias of shape {tuple(linear_weight.shape[:-1])}, got "
            f"{tuple(linear_bias.shape)}"
        )
    if not all(t.is_floating_point() for t in given) or (
        any(t.dtype != input.dtype for t in given) and not cast_to_one_dtype(*given)
    ):
        got = ", ".join(str(t.dtype) for t in given)
        raise RuntimeError(
            f"{name}: input, weight and bias must be floating-point and have the same dtype, got "
            f"{got}"
        )


def _check_rest(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int | None,
    probabilities: bool,
) -> None:
    """Raises what stock raises for a target and weights that do not fit."""
    name = "linear_cross_entropy"
    rows, outer = input.shape[:-1], linear_weight.shape[1:-1]
    # the logits without their memory
    logits = input.new_empty(()).expand(*rows, linear_weight.shape[0], *outer)
    if probabilities:
        if ignore_index is not None:
            raise RuntimeError(
                f"{name}: ignore_index cannot be specified when target contains probabilities"
            )
        if not target.is_floating_point():
            raise RuntimeError(
                f"{name}: expected probabilities of a floating-point dtype, got {target.dtype}"
            )
        if weight is not None:
            check_weight(name, logits, weight)
    else:
        check_classes(name, logits, target, weight)
    if token_weight is None:
        return
    if token_weight.shape != (*rows, *outer):
        raise RuntimeError(
            f"{name}: expected a token_weight of shape {(*rows, *outer)}, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is not differentiable with respect to token_weight: multiply the losses of "
            'reduction="none" by it'
        )
