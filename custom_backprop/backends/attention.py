"""Primitives of attention.

On a CPU, torch's flash kernel where it knows the bias. Else chunks of rows: a chunk of scores stays
in cache, and of the keys it meets only those of its band.

On a GPU, our kernels, not torch's operators of FlashAttention and cuDNN: their backward adds to dq
in whatever order its programs come, unless torch is told to be deterministic, and then cuDNN's may
not run at all. Ours gives the same bits each time.
"""

from __future__ import annotations

from math import inf, prod

import torch

from ..formulas import attention as formula
from ..formulas.dropout import coefficients, threshold
from ..formulas.precision import wide, widen
from .kernels import kernels
from .library import P as PARTIAL
from .library import R, primitive

aten = torch.ops.aten
_flash_forward = aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

#: scores of a chunk: 1 MiB of float32, of which the cache holds a few (four times as many take 1.6
#: times as long)
CHUNK = 2**18


def _is_flash(q, k, v, slopes, seed, lowest, highest):
    """Whether torch's kernel computes this."""
    return (
        slopes is None
        and seed is None
        and lowest is None
        and highest in (None, 0)
        and q.shape[3] == v.shape[3]
        and q.numel() > 0
        and k.numel() > 0
    )


def like(t, width=None, dtype=None):
    """Memory (B, H, L, width), in the order of that of t: of heads, or of rows of all heads."""
    shape = (*t.shape[:3], t.shape[3] if width is None else width)
    order = (0, 2, 1, 3) if t.stride(1) < t.stride(2) else (0, 1, 2, 3)
    return torch.empty_permuted(shape, order, dtype=dtype or t.dtype, device=t.device)


def _as(t, result):
    """``result`` in memory in the order of that of t."""
    to = like(t, result.shape[3])
    return result if result.stride() == to.stride() else to.copy_(result)


def _rows(*tensors):
    """With the last dimension dense and no two elements in one place. Torch's kernel takes that for
    granted: it writes its results in the strides of what it gets."""
    return [t if t.stride(3) == 1 and _is_apart(t) else t.contiguous() for t in tensors]


def _is_apart(t):
    span = 1
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1:
            if stride < span:
                return False
            span += stride * (n - 1)
    return True


def _numbers(mask, q):
    """A mask of booleans in numbers."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return q.new_zeros(mask.shape).masked_fill_(mask.logical_not(), -inf)


def _forward(q, k, v, mask, slopes, seed, p, lowest, highest, scale):
    if _is_flash(q, k, v, slopes, seed, lowest, highest):
        options = {"attn_mask": _numbers(mask, q), "scale": scale}
        y, l = _flash_forward(*_rows(q, k, v), 0.0, highest == 0, **options)
        return _as(q, y), l.contiguous()
    return _forward_in_chunks(q, k, v, mask, slopes, seed, p, lowest, highest, scale)


def _forward_in_chunks(q, k, v, mask, slopes, seed, p, lowest, highest, scale):
    y = like(q, v.shape[3])
    l = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    for b, i, j, s in _chunks(q, k, mask, slopes, lowest, highest, scale):
        if not s.shape[3]:
            y[b, :, i], l[b, :, i] = 0, 0
            continue
        P, most = _probabilities(s)
        # the largest of a row of P is e^0 / Σ e^(s - m)
        largest = P.amax(3)
        l[b, :, i] = torch.where(largest == 0, 0, most.squeeze(3) - largest.log())
        if seed is not None:
            P *= _noise(P, seed, p, q, k, b, i, j)
        y[b, :, i] = formula.weighted(P, widen(v[b, :, j]))
    return y, l


def _backward(dy, q, k, v, mask, slopes, seed, y, l, p, lowest, highest, scale, *needs):
    if not needs[3] and _is_flash(q, k, v, slopes, seed, lowest, highest):
        options = {"attn_mask": _numbers(mask, q), "scale": scale}
        tensors = *_rows(dy, q, k, v, y), l
        grads = _flash_backward(*tensors, 0.0, highest == 0, **options)
        return *map(_as, (q, k, v), grads), None
    rest = seed, y, l, p, lowest, highest, scale, *needs
    return _backward_in_chunks(dy, q, k, v, mask, slopes, *rest)


def _backward_in_chunks(
    dy, q, k, v, mask, slopes, seed, y, l, p, lowest, highest, scale, *needs
):  # fmt: skip
    need_q, need_k, need_v, need_mask = needs
    dq = like(q).zero_() if need_q else None
    dk, dv = (
        like(t, dtype=wide(t.dtype)).zero_() if need else None
        for t, need in ((k, need_k), (v, need_v))
    )
    dmask = mask.new_zeros(mask.shape, dtype=wide(mask.dtype)) if need_mask else None
    for b, i, j, s in _chunks(q, k, mask, slopes, lowest, highest, scale):
        if not s.shape[3]:
            continue
        P, _ = _probabilities(s)
        dy_, k_, v_ = widen(dy[b, :, i]), widen(k[b, :, j]), widen(v[b, :, j])
        dP = formula.products(dy_, v_)
        noise = None if seed is None else _noise(P, seed, p, q, k, b, i, j)
        if dv is not None:
            dv[b, :, j] += formula.gathered(formula.dropped(P, noise), dy_, v_)
        if noise is not None:
            dP *= noise
        ds = formula.softmax_backward(dP, P, 3)
        if dmask is not None:
            part = dmask[b if len(dmask) > 1 else slice(None), :, i, j]
            part += ds.sum_to_size(part.shape)
        if dq is not None:
            dq[b, :, i] = formula.weighted(ds, k_).mul_(scale)
        if dk is not None:
            dk[b, :, j] += formula.gathered(ds, widen(q[b, :, i]), k_).mul_(scale)
    return (
        dq,
        None if dk is None else dk.to(k.dtype),
        None if dv is None else dv.to(v.dtype),
        None if dmask is None else dmask.to(mask.dtype),
    )


def _probabilities(s):
    """P, 0 in a row that is all -∞, and the largest of each row of s."""
    most, P = s.amax(3, keepdim=True), s.softmax(3)
    if (dead := most == -inf).any():
        P.masked_fill_(dead, 0)
    return P, most


def _chunks(q, k, mask, slopes, lowest, highest, scale):
    """The slices of a chunk's batches, queries and keys, and its scores."""
    B, H, L, _ = q.shape
    S = k.shape[2]
    batches = max(1, min(B, CHUNK // max(H * L * S, 1)))
    rows = max(1, min(L, CHUNK // max(H * S, 1)))
    for at in range(0, B, batches):
        for first in range(0, L, rows):
            b, i = slice(at, at + batches), slice(first, first + rows)
            start = 0 if lowest is None else min(max(first + lowest, 0), S)
            end = S if highest is None else max(min(first + rows + highest, S), start)
            j = slice(start, end)
            s = formula.products(widen(q[b, :, i]), widen(k[b, :, j])).mul_(scale)
            part = None if mask is None else mask[b if len(mask) > 1 else slice(None), :, i, j]
            yield b, i, j, formula.biased(s, part, slopes, lowest, highest, S - L, first, start)


def _noise(P, seed, p, q, k, b, i, j):
    """That of a chunk."""
    return formula.noise_of(P, seed, p, q.shape[2], k.shape[2], b.start, i.start, j.start)


def _has_kernel(q, v):
    return max(q.shape[3], v.shape[3]) <= kernels("attention").LARGEST[q.dtype]


def _dropout(seed, p):
    """What the kernels get of it."""
    return None if seed is None else (seed, threshold(p), coefficients(p, False)[0])


def _launch_forward(q, k, v, mask, slopes, seed, p, *options):
    if not _has_kernel(q, v):
        return _forward_in_chunks(q, k, v, mask, slopes, seed, p, *options)
    y, l = _fake_forward(q, k, v)
    dropout = _dropout(seed, p)
    kernels("attention").forward(q, k, v, mask, slopes, dropout, *options, y, l)
    return y, l


def _launch_backward(dy, q, k, v, mask, slopes, seed, y, l, p, *rest):
    if not _has_kernel(q, v):
        return _backward_in_chunks(dy, q, k, v, mask, slopes, seed, y, l, p, *rest)
    grads, dropout = _fake_backward(dy, q, k, v, mask, *rest), _dropout(seed, p)
    kernels("attention").backward(dy, q, k, v, mask, slopes, dropout, y, l, *rest[:3], *grads)
    return grads


def _by_formula(*args):
    """What a Function returns is not a view, as y of grouped heads would be."""
    y, l = formula.attention(*args)
    return y.clone(), l


def _fake_forward(q, k, v, *rest):
    return like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _fake_backward(dy, q, k, v, mask, *rest):
    need_mask = rest[-1]
    grads = [like(t) if need else None for t, need in zip((q, k, v), rest[-4:], strict=False)]
    return *grads, mask.new_empty(mask.shape) if need_mask else None


def _sharding(q, k, v, mask, slopes, seed, *rest):
    """Along the batch; and along the heads, if keys have as many. A seed is that of whole
    tensors."""
    for i in () if seed is not None else (0, 1) if q.shape[1] == k.shape[1] else (0,):
        of_mask = None if mask is None else i if mask.shape[i] > 1 else R
        of_slopes = None if slopes is None else 0 if i else R
        yield [i, i], [i, i, i, of_mask, of_slopes, None]


def _backward_sharding(dy, q, k, v, mask, slopes, seed, y, l, *rest):
    needs = rest[-4:]
    for outputs, inputs in _sharding(q, k, v, mask, slopes, seed):
        i = outputs[0]
        of_mask = PARTIAL if inputs[3] == R else inputs[3]
        grads = [g if need else R for g, need in zip((i, i, i, of_mask), needs, strict=True)]
        yield grads, [i, *inputs, i, i]


def _flops(q, k, v, *_):
    """q kᵀ and P v of all keys, as torch counts them, also where a band leaves some out."""
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


def _backward_flops(dy, q, k, v, *rest):
    """q kᵀ again and dy vᵀ, and of the gradients those that are needed."""
    need_q, need_k, need_v, _ = rest[-4:]
    return 2 * prod(q[:3]) * k[2] * ((1 + need_q + need_k) * q[3] + (1 + need_v) * v[3])


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? seed"
_OPTIONS = "float p, SymInt? lowest, SymInt? highest, float scale"
_NEEDS = "bool need_q, bool need_k, bool need_v, bool need_mask"

forward = primitive(
    f"attention_forward({_INPUTS}, {_OPTIONS}) -> (Tensor y, Tensor l)",
    formula=_by_formula,
    aten=_forward,
    triton=_launch_forward,
    fake=_fake_forward,
    traced="kernel",
    sharding=_sharding,
    flops=_flops,
)
backward = primitive(
    f"attention_backward(Tensor dy, {_INPUTS}, Tensor y, Tensor l, {_OPTIONS}, {_NEEDS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
    formula=formula.attention_backward,
    aten=_backward,
    triton=_launch_backward,
    fake=_fake_backward,
    traced="kernel",
    sharding=_backward_sharding,
    flops=_backward_flops,
)
