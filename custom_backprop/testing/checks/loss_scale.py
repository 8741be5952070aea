"""Gradients under a loss scale."""

from __future__ import annotations

import torch

from ..case import Case, gradients, outputs, weights_for
from ..outcome import NotApplicable, feature, first_sample
from ..sweep import HALVES
from .compare import require, with_reference
from .determinism import seeded

#: dtype -> powers of 2 that neither overflow nor underflow a gradient of about 1
SCALES = {torch.float16: (8, -8), torch.bfloat16: (60, -60)}


@feature
@first_sample
def loss_scale(case: Case) -> None:
    """In half precision, the gradients for dy times 2^k are 2^k times those for dy, to rounding,
    wherever the reference's neither overflow nor underflow.

    Finds what a GradScaler meets: sums in half precision that overflow, an epsilon or a threshold
    that is compared with dy, and products of dy with itself.
    """
    with_reference(case)
    dtypes = [dtype for dtype in case.low_precision if dtype in HALVES]
    if not dtypes:
        raise NotApplicable("no half precision is asked for")
    for dtype in dtypes:
        half, least = case.to(dtype), torch.finfo(dtype).tiny
        dys = weights_for(outputs(half.call_reference(*half.leaves)))
        for k in SCALES[dtype]:
            pairs = []
            for call in (half.call, half.call_reference):
                for weights in (dys, [dy * 2.0**k for dy in dys]):
                    with seeded(half):
                        pairs.append(gradients(call, half.leaves, weights)[1])
            for i, (one, scaled, their, theirs) in enumerate(zip(*pairs, strict=True)):
                if any(g is None for g in (one, scaled, their, theirs)):
                    continue
                judged = theirs.isfinite() & (theirs.abs() >= least) & (their.abs() >= least)
                one, scaled, their, theirs = (
                    torch.where(judged, g.double() * 2.0**s, 0.0)
                    for g, s in ((one, 0), (scaled, -k), (their, 0), (theirs, -k))
                )
                if not one.numel():
                    continue
                off, stock = ((a - b).abs().max() for a, b in ((scaled, one), (theirs, their)))
                allowed = stock + 2 * torch.finfo(dtype).eps * their.abs().max()
                require(
                    bool(off <= allowed),
                    f"in {dtype} the gradient of input {i} for dy times 2^{k} is off 2^{k} times "
                    f"that for dy by {off:.2e}, the reference's by {stock:.2e}",
                )
