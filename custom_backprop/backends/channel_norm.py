"""Primitives of group_norm and batch_norm. This one has one more pair for constant statistics, and
its dx alone, for sums that are known."""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

from ..formulas import channel_norm as formula
from ..formulas.channel_norm import dense
from ..formulas.precision import HALF, wide, widen
from .library import P, R, launcher, primitive

aten = torch.ops.aten


def _parameters(x, *tensors):
    """Weights and biases as ATen wants them for statistics in float32; or None if it takes no such
    dtypes."""
    found = [t if t is None else (widen(t) if x.dtype in HALF else t).contiguous() for t in tensors]
    return found if all(t is None or t.dtype == wide(x.dtype) for t in found) else None


def _inputs(*tensors):
    """x, and dy beside it, in a memory format that ATen knows."""
    x = tensors[-1]
    if x.is_contiguous():  # the format need not be asked for, which is slow
        return [t.contiguous() for t in tensors]
    x = dense(x, x)
    memory_format = suggest_memory_format(x)
    return [dense(t, x).contiguous(memory_format=memory_format) for t in tensors]


def _output(y, x):
    """y, laid out as a formula lays it out."""
    expected = dense(x, x)
    return y if y.stride() == expected.stride() else torch.empty_like(expected).copy_(y)


def _cut(x, groups):
    """(N, C, S, groups)"""
    return *x.shape[:2], x.shape[2:].numel(), groups


def _forward(x, weight, bias, groups, eps):
    given = _parameters(x, weight, bias)
    if not x.numel() or given is None:
        return formula.group_norm(x, weight, bias, groups, eps)
    if groups == x.shape[1]:
        return _instances(x, given, eps)
    if x.dtype in HALF and weight is None:  # without one ATen's statistics are of x's dtype
        given[0] = x.new_ones(x.shape[1], dtype=torch.float32)
    y, *statistics = aten.native_group_norm.default(*_inputs(x), *given, *_cut(x, groups), eps)
    return _output(y, x), *statistics


def _backward(dy, x, weight, mean, rstd, groups, *needs):
    given = _parameters(x, weight)
    if not x.numel() or given is None:
        return formula.group_norm_backward(dy, x, weight, mean, rstd, groups, *needs)
    if groups == x.shape[1]:
        return _instances_backward(dy, x, weight, given, mean, rstd, needs)
    if weight is None and any(needs[1:]):  # ATen asks it for the dtype of their gradients
        given[0] = x.new_ones(x.shape[1], dtype=wide(x.dtype))
    statistics = mean.contiguous(), rstd.contiguous()
    grads = aten.native_group_norm_backward.default(
        *_inputs(dy, x), *statistics, *given, *_cut(x, groups), needs
    )
    return _gradients(x, weight, grads, needs)


def _as_batch(x):
    """A channel of each sample as one of a batch of one."""
    return x.contiguous().view(1, x.shape[0] * x.shape[1], -1)


def _repeated(x, given):
    return [None if t is None else t.repeat(x.shape[0]) for t in given]


def _instances(x, given, eps):
    """A group a channel: ATen's batch_norm is more exact than its group_norm, which takes dx apart
    into c1 dy + c2 x + c3."""
    options = None, None, True, 0.0, eps
    y, *statistics = aten.native_batch_norm.default(_as_batch(x), *_repeated(x, given), *options)
    y = aten._unsafe_view.default(y, x.shape)  # which is not a view
    return _output(y, x), *(t.view(x.shape[:2]) for t in statistics)


def _instances_backward(dy, x, weight, given, mean, rstd, needs):
    statistics = None, None, mean.flatten(), rstd.flatten(), True, 0.0
    dx, *grads = aten.native_batch_norm_backward.default(
        _as_batch(dy), _as_batch(x), *_repeated(x, given), *statistics, needs
    )
    grads = [
        g.view(x.shape[:2]).sum(0) if need else None
        for g, need in zip(grads, needs[1:], strict=True)
    ]
    dx = aten._unsafe_view.default(dx, x.shape) if needs[0] else None
    return _gradients(x, weight, (dx, *grads), needs)


def _gradients(x, weight, grads, needs):
    """Each as its tensor is; None for each that is not needed."""
    dtype = (x if weight is None else weight).dtype
    need_x, need_weight, need_bias = needs
    dx, dw, db = grads
    return (
        _output(dx, x) if need_x else None,
        dw.to(dtype) if need_weight else None,
        db.to(dtype) if need_bias else None,
    )


def _fake_backward(dy, x, weight, *rest):
    one, c, needs = x if weight is None else weight, x.shape[1], rest[-3:]
    dx = torch.empty_like(dense(x, x)) if needs[0] else None
    return dx, *(one.new_empty(c) if need else None for need in needs[1:])


def _fake(x, weight, bias, groups, eps):
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=wide(x.dtype)) for _ in range(2))
    return torch.empty_like(dense(x, x)), mean, rstd


def _sharding(x, weight, bias, groups, eps):
    """By samples."""
    yield [0, 0, 0], [0, R, R]


def _backward_sharding(dy, x, weight, mean, rstd, groups, *needs):
    grads = [lies if need else R for lies, need in zip((0, P, P), needs, strict=True)]
    yield grads, [0, 0, R, 0, 0]


def _batch_forward(x, weight, bias, eps):
    given = _parameters(x, weight, bias)
    if not x.numel() or given is None:
        return formula.batch_norm(x, weight, bias, eps)
    # running statistics that move all the way are those of the batch
    mean, variance = (x.new_zeros(x.shape[1], dtype=wide(x.dtype)) for _ in range(2))
    options = True, 1.0, eps
    y, mean, rstd = aten.native_batch_norm.default(*_inputs(x), *given, mean, variance, *options)
    return _output(y, x), mean, variance, rstd


def _batch_backward(dy, x, weight, mean, rstd, *needs):
    given = _parameters(x, weight)
    if not x.numel() or given is None:
        return formula.batch_norm_backward(dy, x, weight, mean, rstd, *needs)
    statistics = None, None, mean.contiguous(), rstd.contiguous()
    return _by_aten(dy, x, weight, given, statistics, True, 0.0, needs)


def _by_aten(dy, x, weight, given, statistics, training, eps, needs):
    grads = aten.native_batch_norm_backward.default(
        *_inputs(dy, x), *given, *statistics, training, eps, needs
    )
    return _gradients(x, weight, grads, needs)


def _frozen_forward(x, weight, bias, mean, variance, eps):
    given = _parameters(x, weight, bias, mean, variance)
    if not x.numel() or given is None:
        return formula.frozen_norm(x, weight, bias, mean, variance, eps)
    y, *_ = aten.native_batch_norm.default(*_inputs(x), *given, False, 0.0, eps)
    return _output(y, x)


def _frozen_backward(dy, x, weight, mean, variance, eps, *needs):
    given = _parameters(x, weight, mean, variance)
    if not x.numel() or given is None:
        return formula.frozen_norm_backward(dy, x, weight, mean, variance, eps, *needs)
    statistics = *(t.contiguous() for t in given[1:]), None, None
    return _by_aten(dy, x, weight, given[:1], statistics, False, eps, needs)


def _fake_batch(x, weight, bias, eps):
    statistics = (x.new_empty(x.shape[1], dtype=wide(x.dtype)) for _ in range(3))
    return torch.empty_like(dense(x, x)), *statistics


def _fake_input(dy, x, *_):
    return torch.empty_like(dense(x, x))


def _fake_frozen(x, *_):
    return torch.empty_like(dense(x, x))


def _batch_sharding(x, weight, bias, eps):
    """By channels."""
    yield [1, 0, 0, 0], [1, 0, 0]


def _batch_backward_sharding(dy, x, weight, mean, rstd, *needs):
    yield _lies(1, 0, needs), [1, 1, 0, 0, 0]


def _frozen_sharding(x, weight, bias, mean, variance, eps):
    """By samples or channels."""
    yield [0], [0, R, R, R, R]
    yield [1], [1, 0, 0, 0, 0]


def _frozen_backward_sharding(dy, x, weight, mean, variance, eps, *needs):
    yield _lies(0, P, needs), [0, 0, R, R, R]
    yield _lies(1, 0, needs), [1, 1, 0, 0, 0]


def _lies(of_x, of_parameters, needs):
    """How the gradients lie."""
    places = zip((of_x, of_parameters, of_parameters), needs, strict=True)
    return [lies if need else R for lies, need in places]


forward = primitive(
    "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    formula=formula.group_norm,
    aten=_forward,
    triton=launcher("channel_norm", "forward"),
    fake=_fake,
    sharding=_sharding,
)
backward = primitive(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "int groups, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.group_norm_backward,
    aten=_backward,
    triton=launcher("channel_norm", "backward"),
    fake=_fake_backward,
    sharding=_backward_sharding,
)
batch_forward = primitive(
    "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor y, Tensor mean, Tensor variance, Tensor rstd)",
    formula=formula.batch_norm,
    aten=_batch_forward,
    triton=launcher("channel_norm", "batch_forward"),
    fake=_fake_batch,
    sharding=_batch_sharding,
)
batch_backward = primitive(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.batch_norm_backward,
    aten=_batch_backward,
    triton=launcher("channel_norm", "batch_backward"),
    fake=_fake_backward,
    sharding=_batch_backward_sharding,
)
batch_input = primitive(
    "batch_norm_input(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor along, "
    "Tensor total) -> Tensor",
    formula=formula.batch_norm_input,
    triton=launcher("channel_norm", "batch_input"),
    fake=_fake_input,
)
frozen_forward = primitive(
    "frozen_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
    "float eps) -> Tensor",
    formula=formula.frozen_norm,
    aten=_frozen_forward,
    triton=launcher("channel_norm", "frozen_forward"),
    fake=_fake_frozen,
    sharding=_frozen_sharding,
)
frozen_backward = primitive(
    "frozen_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor variance, "
    "float eps, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.frozen_norm_backward,
    aten=_frozen_backward,
    triton=launcher("channel_norm", "frozen_backward"),
    fake=_fake_backward,
    sharding=_frozen_backward_sharding,
)
