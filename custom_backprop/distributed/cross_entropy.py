"""Cross-entropy of logits whose classes are sharded over the ranks of a group: no rank ever has a
whole row.

With m the largest logit of a row over all ranks, Z = Σ_c e^(x_c - m), C classes and s =
label_smoothing,

    L = log Z - (1 - s) (x_t - m) - s/C Σ_c (x_c - m)
    dx_c = dy (p_c - (1 - s) [c = t] - s/C),  p_c = e^(x_c - m) / Z.

p_t - 1 is not computed by subtraction: see :mod:`custom_backprop.formulas.cross_entropy`. Z is S +
e^(x_t - m) with S = Σ_{c != t} e^(x_c - m), and log Z is log1p(S) where x_t = m.

Each rank knows its part of every sum over c, and x_t is such a sum, too, with one term. So two
all-reduces give all ranks the loss: one for m, and one for the sums, two or three numbers per row.
dx_c needs only m and Z, which every rank then has: backward sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..dtensor import is_dtensor
from ..formulas.nll import of_rows, reduced
from ..formulas.precision import widen


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Takes x (N, C_r, ...), which has the classes from ``first`` on, and the targets t (N,
    ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        group: Any,
        first: int,
        classes: int,
        ignore_index: int,
        reduction: int,
        smoothing: float,
    ) -> Tensor:
        wide, counted = widen(x), target != ignore_index
        largest = wide.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        z = wide - largest.unsqueeze(1)
        here = counted & (target >= first) & (target < first + x.shape[1])
        index = torch.where(here, target - first, 0).unsqueeze(1)
        hit, z_t = here.unsqueeze(1), z.gather(1, index)
        terms = [torch.where(hit, z_t, 0).squeeze(1)]
        if smoothing:
            terms.append(z.sum(1))
        others = z.exp_().scatter_(1, index, torch.where(hit, 0, z_t.exp()))
        sums = torch.stack([*terms, others.sum(1)])
        dist.all_reduce(sums, group=group)
        log_z = torch.where(sums[0] == 0, sums[-1].log1p(), (sums[-1] + sums[0].exp()).log())
        rows = log_z - (1 - smoothing) * sums[0]
        if smoothing:
            rows -= smoothing / classes * sums[1]
        w = (
            torch.where((target >= 0) & (target < classes), 1.0, torch.nan)
            .to(wide.dtype)
            .masked_fill(~counted, 0)
        )
        ctx.save_for_backward(x, target, here, index, largest, log_z, w)
        ctx.options = classes, ignore_index, reduction, smoothing
        return reduced(torch.where(counted, w * rows, 0), w.sum(), reduction).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.no_grad():
            dx = _VocabParallelCrossEntropy._gradient(ctx, dy)
        if torch.is_grad_enabled():
            # torch's once_differentiable treats the gradient as a constant if dy needs none
            dx = _NotTwice.apply(dx, ctx.saved_tensors[0], dy)
        return dx, *(None,) * 7

    @staticmethod
    def _gradient(ctx: Any, dy: Tensor) -> Tensor:
        x, target, here, index, largest, log_z, w = ctx.saved_tensors
        classes, ignore_index, reduction, smoothing = ctx.options
        d = torch.sub(widen(x), largest.unsqueeze(1)).sub_(log_z.unsqueeze(1))
        log_p = d.gather(1, index)
        of_class = torch.where(here.unsqueeze(1), log_p.expm1() + smoothing, log_p.exp())
        d.exp_().scatter_(1, index, of_class)
        if smoothing:
            d -= smoothing / classes
        d *= (w * of_rows(dy, target, w, reduction, ignore_index)).unsqueeze(1)
        return d.to(x.dtype)


class _NotTwice(torch.autograd.Function):
    """A gradient that depends on ``sources``, and raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        raise RuntimeError(
            "vocab_parallel_cross_entropy is not differentiable twice: no rank has the "
            "data for that"
        )


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    classes: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """On every rank, the loss that ``cross_entropy`` gives for the whole rows. Its gradient is that
    with respect to this rank's logits.

    Every rank of the group must call it. All ranks get the same loss, which counts once in the
    gradient. It is not differentiable twice.

    Args:
        logits: this rank's classes, of shape (N, C_r) or (N, C_r, d1, ..., dK), floating-point, in
            the order of the ranks of the group, as ``ColwiseParallel`` shards them.
        target: classes in [0, C), where C counts those of all ranks, of shape (N) or (N, d1, ...,
            dK), int64; the same on every rank.
        group: the ranks over which the classes are sharded, such as ``mesh.get_group()``. Default:
            all.
        classes: C. Default: C_r times the number of ranks. Pass it if the classes do not divide
            evenly; all ranks but the last then have ceil(C / ranks), as in DTensor's shards.
        ignore_index, reduction, label_smoothing: as in
            :func:`custom_backprop.functional.cross_entropy`.

    Raises:
        ValueError: an unknown reduction, or shapes that do not fit.
        IndexError: a class out of range, on a CPU. On a GPU, where this check would have to wait,
            the loss and the gradient of its row are NaN.
        RuntimeError: a DTensor, classes that are not int64, ``label_smoothing`` above 1, or no
            process group.
    """
    number = _Reduction.get_enum(reduction)
    if is_dtensor(logits) or is_dtensor(target):
        raise RuntimeError(
            "vocab_parallel_cross_entropy takes this rank's part as a plain tensor: give "
            "logits.to_local() and target.to_local() "
            "(ColwiseParallel() leaves it so; use_local_output=False does not)"
        )
    if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        given = f"logits {tuple(logits.shape)}, target {tuple(target.shape)}"
        raise ValueError(
            "vocab_parallel_cross_entropy: expected logits (N, C_r, ...) and a target (N, ...), "
            f"got {given}"
        )
    if target.dtype != torch.int64:
        raise RuntimeError(
            f"vocab_parallel_cross_entropy: expected classes in int64, got {target.dtype}"
        )
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total = ranks * logits.shape[1] if classes is None else classes
    share = -(-total // ranks)
    if (ranks - 1) * share >= total:
        raise ValueError(
            f"vocab_parallel_cross_entropy: {total} classes are too few for {ranks} ranks"
        )
    if logits.shape[1] != (expected := min(share, total - rank * share)):
        raise ValueError(
            f"vocab_parallel_cross_entropy: rank {rank} of {ranks} has {logits.shape[1]} of "
            f"{total} classes, not {expected}"
        )
    if target.is_cpu and bool(
        (((target < 0) | (target >= total)) & (target != ignore_index)).any()
    ):
        raise IndexError(
            f"vocab_parallel_cross_entropy: a target is out of bounds for {total} classes"
        )
    smoothing = float(max(label_smoothing, 0.0))
    return _VocabParallelCrossEntropy.apply(
        logits, target, group, rank * share, total, ignore_index, number, smoothing
    )
