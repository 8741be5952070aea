"""Primitives of embedding_bag. ``padding_idx`` is -1 where there is none."""

from __future__ import annotations

import torch

from ..formulas import embedding_bag as formula
from ..formulas.precision import HALF
from . import embedding
from .library import P, R, builtin, launcher, primitive

_embedding_bag = builtin(torch.ops.aten._embedding_bag)
_bag_backward = builtin(torch.ops.aten._embedding_bag_backward)
_MODES = {"sum": 0, "mean": 1, "max": 2}


def _within(index, bounds, per_sample):
    """The entries up to the last bag's end, contiguous and in one dtype, as PyTorch's operators
    silently assume."""
    end = int(bounds[-1])
    per_sample = per_sample if per_sample is None else per_sample[:end]
    return index[:end].to(bounds.dtype).contiguous(), per_sample


def _forward(weight, per_sample, index, bounds, mode, padding_idx, scale_grad_by_freq, sparse):
    bounds = bounds.contiguous()
    index, per_sample = _within(index, bounds, per_sample)
    y, _, counted, picked = _embedding_bag(
        weight, index, bounds[:-1], False, _MODES[mode], False, per_sample, False, padding_idx
    )
    return y, torch.where(counted.unsqueeze(1) > 0, picked, -1) if mode == "max" else None


def _weight_gradient(dy, per_sample, index, bounds, rows, mode, padding_idx, scale_grad_by_freq):
    """dW of a sum or a mean."""
    if dy.dtype in HALF or scale_grad_by_freq:  # PyTorch 2.13 errs there (issue 190063)
        each = formula.entry_gradients(dy, per_sample, index, bounds, mode, padding_idx)
        dw = embedding.backward.aten(each, index, rows, padding_idx, scale_grad_by_freq)
        return dw.to(dy.dtype)
    bounds = bounds.contiguous()
    index, per_sample = _within(index, bounds, per_sample)
    counted, absent = bounds.diff(), bounds[:0]
    if padding_idx >= 0:
        bag = torch.repeat_interleave(counted, output_size=index.shape[0])
        counted = counted - torch.bincount(bag[index == padding_idx], minlength=dy.shape[0])
    return _bag_backward(
        dy.contiguous(), index, bounds[:-1], absent, counted, absent, rows, False, _MODES[mode],
        False, per_sample, padding_idx,
    )  # fmt: skip


def _backward(
    dy, weight, per_sample, picked, index, bounds, rows, mode, padding_idx, scale_grad_by_freq,
    need_weight, need_per_sample,
):  # fmt: skip
    options = index, bounds, rows, mode, padding_idx, scale_grad_by_freq
    if need_weight and mode != "max" and dy.shape[0]:
        dw = _weight_gradient(dy, per_sample, *options)
        need_weight = False
    else:
        dw = None
    first, dp = formula.bag_backward(
        dy, weight, per_sample, picked, *options, need_weight, need_per_sample
    )
    return first if dw is None else dw, dp


def _sharding(weight, per_sample, index, bounds, mode, *options):
    yield [1, 1 if mode == "max" else R], [1, R, R, R]


def _backward_sharding(dy, weight, per_sample, picked, index, bounds, rows, mode, *rest):
    need_weight, need_per_sample = rest[-2:]
    grads = [1 if need_weight else R, P if need_per_sample else R]
    yield grads, [1, 1, R, 1 if mode == "max" else R, R, R]


forward = primitive(
    "embedding_bag_forward(Tensor weight, Tensor? per_sample_weights, Tensor index, Tensor bounds, "
    "str mode, int padding_idx, bool scale_grad_by_freq, bool sparse) -> (Tensor y, Tensor picked)",
    formula=formula.bag_forward,
    aten=_forward,
    triton=launcher("embedding_bag", "forward"),
    sharding=_sharding,
)
backward = primitive(
    "embedding_bag_backward(Tensor dy, Tensor? weight, Tensor? per_sample_weights, Tensor? picked, "
    "Tensor index, Tensor bounds, SymInt rows, str mode, int padding_idx, bool scale_grad_by_freq, "
    "bool need_weight, bool need_per_sample_weights) -> (Tensor dw, Tensor dp)",
    formula=formula.bag_backward,
    aten=_backward,
    triton=launcher("embedding_bag", "backward"),
    traced="kernel",  # a compiler would sum by atomics
    sharding=_backward_sharding,
)
