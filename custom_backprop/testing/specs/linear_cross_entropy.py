"""The spec of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample
from .nll import some_classes

#: rows, classes, features
SIZES = {
    "awkward": (37, 1031, 7),
    "small": (64, 64, 64),
    "medium": (256, 4096, 128),
    "large": (1024, 32000, 512),
    "huge": (8192, 131072, 4096),
}


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
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    return_z_loss: bool = False,
    return_log_probs: bool = False,
) -> Any:
    """By stock's functions, with the logits in memory."""
    flat = linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    z = F.linear(input, *flat).unflatten(-1, linear_weight.shape[:-1])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    ignored = -100 if ignore_index is None else ignore_index
    options: Any = {"ignore_index": ignored, "label_smoothing": label_smoothing}
    if token_weight is None and not (z_loss or return_log_probs):
        return F.cross_entropy(z, target, weight, reduction=reduction, **options)
    rows = F.cross_entropy(z, target, weight, reduction="none", **options)
    of_z = z_loss * z.logsumexp(input.dim() - 1).square().to(rows.dtype)
    w = torch.ones_like(rows) if token_weight is None else token_weight
    total = w
    if not target.is_floating_point():
        w = torch.where(target == ignored, 0, w)
        total = w if weight is None else w * weight[torch.where(target == ignored, 0, target)]

    def reduced(of_rows: Tensor) -> Tensor:
        if reduction == "none":
            return w * of_rows
        return (w * of_rows).sum() / (total.sum() if reduction == "mean" else 1)

    found = [reduced(rows + of_z)]
    if return_z_loss:
        found.append(reduced(of_z))
    if return_log_probs:
        found.append(-F.cross_entropy(z, target, ignore_index=ignored, reduction="none"))
    return tuple(found) if len(found) > 1 else found[0]


def _layer(make: Make, *shapes: tuple[int, ...]) -> Any:
    """Numbers that bfloat16 holds. Autocast would round others, which is an error of stock and of
    ours alike, so that chance would say whose is larger."""
    return tuple(
        make.tensor(*shape).detach().bfloat16().to(make.dtype).requires_grad_() for shape in shapes
    )


def _samples(make: Make) -> Iterator[Sample]:
    x, w, b = _layer(make, (2, 2), (3, 2), (3,))
    yield Sample((x, w, some_classes(make, 2, high=3), b), name="mean")
    options: Any = {
        "weight": make.tensor(3, low=0.1, requires_grad=False),
        "ignore_index": 2,
        "label_smoothing": 0.2,
        "reduction": "sum",
    }
    several = *_layer(make, (2, 1), (3, 2, 1, 1)), make.index(2, 2, 1, high=3)
    yield Sample(several, options, name="several predictions, weight, smoothing, sum")
    tokens = make.tensor(3, low=0.1, requires_grad=False)
    options = {"token_weight": tokens, "softcap": 4.0, "z_loss": 0.1, "chunk_size": 2}
    three = *_layer(make, (3, 1), (2, 1)), some_classes(make, 3, high=2)
    yield Sample(
        three, {**options, "reduction": "none"}, name="weights of tokens, soft cap, z-loss, none"
    )
    classes = make.tensor(2, low=0.1, requires_grad=False)
    options = {"token_weight": tokens, "weight": classes, "softcap": 4.0}
    yield Sample(three, options, name="weights of tokens and of classes, soft cap, mean")
    one = *_layer(make, (2,), (3, 2)), make.index(1, high=3).view(())
    yield Sample(one, name="one row")
    options = {
        "weight": make.tensor(3, low=0.1, requires_grad=False),
        "token_weight": make.tensor(2, 1, low=0.1, requires_grad=False),
        "label_smoothing": 0.3,
        "z_loss": 0.1,
    }
    given = *_layer(make, (2, 1), (3, 1, 1)), make.probabilities(2, 3, 1, dim=1)
    yield Sample(given, options, name="probabilities, weights, smoothing, z-loss, mean")
    nothing = make.tensor(0, 2), make.tensor(3, 2), make.index(0, high=3), make.tensor(3)
    yield Sample(nothing, {"reduction": "sum"}, name="no rows")


def _large(make: Make, size: str) -> Sample:
    rows, classes, features = SIZES[size]
    bound = 3 / features**0.5
    layer = make.tensor(rows, features), make.tensor(classes, features, low=-bound, high=bound)
    return Sample((*layer, make.index(rows, high=classes)))


def _regimes(make: Make) -> Iterator[Sample]:
    """The soft cap and the z-loss, of rows that fit in one block, of rows that are read in a loop,
    and of several predictions; with offsets in a chunk, and of classes, in int64."""
    for options in ({"softcap": 30.0}, {"z_loss": 1e-4}, {"softcap": 30.0, "z_loss": 1e-4}):
        for rows, classes in (
            (256, (1024,)),
            (256, (2**15,)),
            (256, (1024, 4)),
            (2**16, (2**15,)),
            (1, (2**15, 2**16)),
        ):
            x, w = make.tensor(rows, 16), make.tensor(*classes, 16)
            target = make.index(rows, *classes[1:], high=classes[0])
            yield Sample((x, w, target), {**options, "chunk_size": rows}, name=f"{options}")
    given = make.tensor(256, 16), make.tensor(2**15, 16), make.index(256, high=2**15)
    options = {"z_loss": 1e-4, "return_z_loss": True, "return_log_probs": True}
    yield Sample(given, {**options, "reduction": "none"}, name="all outputs")


def inputs(make: Make) -> tuple[Tensor, Tensor]:
    return make.tensor(3, 4), torch.tensor([[0, 1], [2, 1], [1, 2]], device=make.device)


FEATURES: Any = {"in_features": 4, "num_classes": 3}
OPTIONS: Any = {
    **FEATURES,
    "out_features": (2,),
    "bias": True,
    "reduction": "sum",
    "weight": torch.tensor([0.5, 2.0, 3.0]),
    "ignore_index": 1,
    "label_smoothing": 0.1,
}

SPECS = [
    OpSpec(
        name="linear_cross_entropy",
        family="linear_cross_entropy",
        formula="L = Σ q (lse - l), l = x Wᵀ + b, lse = log Σ e^l;  "
        "dl = dy (softmax(l) Σ q - q), dx = dl W, dW = dlᵀ x, db = Σ dl",
        function=functional.linear_cross_entropy,
        reference=linear_cross_entropy,
        samples=_samples,
        launches=(24, 2),
        large=_large,
        regimes=_regimes,
        module=(nn.LinearCrossEntropyLoss, nn.linear_cross_entropy._Stock, OPTIONS, inputs),
        module_variants=({**FEATURES, "out_features": (2,), "softcap": 2.0, "z_loss": 0.1},),
    ),
]
