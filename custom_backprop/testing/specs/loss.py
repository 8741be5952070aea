"""Specs of the pointwise losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ...formulas.loss import LOSSES
from ..spec import ELEMENTWISE_SIZES as SIZES
from ..spec import Make, OpSpec, Sample


def _spec(
    name: str,
    module: str,
    samples: Callable[[Make], Iterator[Sample]],
    large: Callable[[Make, tuple[int, int]], tuple[Tensor, ...]],
    kwargs: dict[str, Any] | None = None,
    others: Callable[[Make], dict[str, Any]] = lambda make: {},
    inputs: Callable[[Make], tuple[Tensor, ...]] | None = None,
    variants: tuple[dict[str, Any], ...] = (),
    representative: bool = False,
    **arguments: Any,
) -> OpSpec:
    """``inputs`` makes the inputs of the module (default: ``large``). ``kwargs`` are the arguments
    of the benchmark, ``arguments`` and ``variants`` those of the module, and ``others`` those with
    which the kernels take branches that the benchmark does not."""

    def regimes(make: Make) -> Iterator[Sample]:
        tensors = tuple(t.detach().requires_grad_() for t in large(make, SIZES["medium"]))
        yield Sample(tensors, {"reduction": "none", **others(make)}, name="none")

    return OpSpec(
        name=name,
        family="loss",
        formula=LOSSES[name].formula,
        function=getattr(functional, name),
        reference=getattr(F, name),
        samples=samples,
        launches=(2, 2 if name == "gaussian_nll_loss" else 1),
        large=lambda make, size: Sample(large(make, SIZES[size]), kwargs or {}),
        regimes=regimes,
        module=(
            getattr(nn, module),
            getattr(torch.nn, module),
            arguments,
            inputs or (lambda make: large(make, (3, 5))),
        ),
        module_variants=variants,
        representative=representative,
    )


def _apart(make: Make, *shape: int, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """An input and a target whose difference is not near one of ``kinks``."""
    t = make.tensor(*shape, low=-1, high=1)
    d = make.tensor(*shape, low=-2, high=2, avoid=kinks)
    return (t + d).detach().requires_grad_(), t


def _pair(make: Make, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return make.tensor(*shape), make.tensor(*shape, requires_grad=False)


def _difference(
    kinks: tuple[float, ...], *weight_after: Any, **parameters: float
) -> Callable[[Make], Iterator[Sample]]:
    """Samples for a loss of x - t. ``weight_after`` are the positional arguments between target and
    weight, if torch has a weight."""

    def samples(make: Make) -> Iterator[Sample]:
        yield Sample(_apart(make, 5, kinks=kinks), name="mean")
        yield Sample(
            _apart(make, 2, 3, kinks=kinks), {"reduction": "none", **parameters}, name="none"
        )
        yield Sample(
            (make.tensor(2, 1, 3, low=2, high=3), make.tensor(2, 1)),
            {"reduction": "sum", **parameters},
            name="sum, broadcast",
        )
        yield Sample(_apart(make, kinks=kinks), parameters, name="0-D")
        yield Sample(_apart(make, 0, 3, kinks=kinks), {"reduction": "sum"}, name="empty")
        if weight_after:
            for reduction in ("mean", "none"):
                after = [reduction if a == "mean" else a for a in weight_after]
                yield Sample(
                    (*_apart(make, 2, 2, kinks=kinks), *after, make.tensor(2, 2, low=0.2)),
                    name=f"weight, {reduction}",
                )

    return samples


def _binary_cross_entropy(make: Make) -> Iterator[Sample]:
    def probabilities(*shape: int) -> Tensor:
        return make.tensor(*shape, low=0.1, high=0.9)

    yield Sample((probabilities(5), probabilities(5)), name="mean")
    yield Sample((probabilities(2, 3), probabilities(2, 3)), {"reduction": "none"}, name="none")
    weight = make.tensor(3, requires_grad=False)
    yield Sample(
        (probabilities(2, 1, 3), probabilities(2, 1, 3), weight),
        {"reduction": "sum"},
        name="sum, weight",
    )
    yield Sample((probabilities(), probabilities()), name="0-D")
    yield Sample((probabilities(0, 3), probabilities(0, 3)), {"reduction": "sum"}, name="empty")


def _binary_cross_entropy_with_logits(make: Make) -> Iterator[Sample]:
    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return make.tensor(*shape), make.tensor(*shape, low=0.1, high=0.9)

    weight, positive = (
        make.tensor(2, 1, 3, requires_grad=False),
        make.tensor(3, low=0.5, high=4, requires_grad=False),
    )
    yield Sample(pair(5), name="mean")
    yield Sample(pair(2, 3), {"reduction": "none"}, name="none")
    yield Sample(
        (*pair(2, 1, 3), weight),
        {"reduction": "sum", "pos_weight": positive},
        name="sum, weight, pos_weight",
    )
    yield Sample(pair(2, 3), {"pos_weight": positive}, name="mean, pos_weight")
    yield Sample(pair(), name="0-D")
    yield Sample(pair(0, 3), {"reduction": "sum"}, name="empty")


def _kl_div(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(5), make.probabilities(5)), {"reduction": "mean"}, name="mean")
    yield Sample((make.tensor(2, 3), make.probabilities(2, 3)), {"reduction": "none"}, name="none")
    yield Sample(
        (make.tensor(2, 1, 3), make.tensor(2, 1, 3)),
        {"reduction": "batchmean", "log_target": True},
        name="batchmean, log_target",
    )
    yield Sample(
        (make.tensor(2, 3), make.tensor(3)),
        {"reduction": "sum", "log_target": True},
        name="sum, log_target, broadcast",
    )
    yield Sample(
        (make.tensor(), make.probabilities(1).sum().detach()),
        {"reduction": "batchmean"},
        name="0-D",
    )
    yield Sample((make.tensor(0, 3), make.tensor(0, 3)), {"reduction": "sum"}, name="empty")


def _gaussian_nll_loss(make: Make) -> Iterator[Sample]:
    def variance(*shape: int) -> Tensor:
        return make.tensor(*shape, low=0.3, high=2)

    yield Sample((make.tensor(5), make.tensor(5), variance(5)), name="mean")
    yield Sample(
        (make.tensor(2, 3), make.tensor(2, 3), variance(2, 3)),
        {"reduction": "none", "full": True},
        name="none, full",
    )
    yield Sample(
        (make.tensor(2, 1, 3), make.tensor(1, 3), variance(2, 1)),
        {"reduction": "sum"},
        name="sum, broadcast",
    )
    yield Sample(
        (make.tensor(2, 3), make.tensor(2, 3), 0.7), {"full": True}, name="a number as variance"
    )
    yield Sample((make.tensor(), make.tensor(), variance()), name="0-D")
    yield Sample(
        (make.tensor(0, 3), make.tensor(0, 3), variance(0, 3)), {"reduction": "sum"}, name="empty"
    )


def _poisson_nll_loss(make: Make) -> Iterator[Sample]:
    def pair(*shape: int, low: float = -2) -> tuple[Tensor, Tensor]:
        return make.tensor(*shape, low=low, high=2), make.tensor(
            *shape, low=0.1, high=4, avoid=(1.0,)
        )

    yield Sample(pair(5), name="mean")
    yield Sample(pair(2, 3), {"reduction": "none", "full": True}, name="none, full")
    yield Sample(
        pair(2, 1, 3, low=0.2),
        {"reduction": "sum", "full": True, "log_input": False},
        name="sum, full, rate",
    )
    yield Sample((*pair(2, 3)[:1], *pair(3)[1:]), name="mean, broadcast")
    yield Sample(pair(low=0.2), {"log_input": False, "eps": 0.1}, name="0-D, rate, eps")
    yield Sample(pair(0, 3), {"reduction": "sum"}, name="empty")


def _probability_pair(make: Make, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return make.tensor(*shape, low=0.01, high=0.99), make.tensor(
        *shape, low=0, high=1, requires_grad=False
    )


def _logit_pair(make: Make, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return make.tensor(*shape), make.tensor(*shape, low=0, high=1, requires_grad=False)


def _rates(make: Make) -> tuple[Tensor, Tensor]:
    return make.tensor(3, 5, low=0.2), make.tensor(3, 5, low=0.1, high=4, requires_grad=False)


def _weight(make: Make) -> dict[str, Any]:
    return {"weight": make.tensor(*SIZES["medium"])}


def _constant_weights(make: Make, *names: str) -> dict[str, Any]:
    return {name: make.tensor(*SIZES["medium"], requires_grad=False) for name in names}


SPECS = [
    _spec(
        "mse_loss",
        "MSELoss",
        _difference((), None, None, "mean"),
        _pair,
        others=_weight,
        representative=True,
        reduction="sum",
    ),
    _spec(
        "l1_loss",
        "L1Loss",
        _difference((0.0,), None, None, "mean"),
        _pair,
        others=_weight,
        reduction="none",
    ),
    _spec(
        "smooth_l1_loss",
        "SmoothL1Loss",
        _difference((-1.0, -0.6, 0.6, 1.0), beta=0.6),
        _pair,
        beta=0.6,
        reduction="none",
    ),
    _spec(
        "huber_loss",
        "HuberLoss",
        _difference((-1.0, -0.6, 0.6, 1.0), "mean", 1.0, delta=0.6),
        _pair,
        others=_weight,
        delta=0.6,
        reduction="sum",
    ),
    _spec(
        "binary_cross_entropy",
        "BCELoss",
        _binary_cross_entropy,
        _probability_pair,
        others=lambda make: _constant_weights(make, "weight"),
        weight=torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]),
        reduction="sum",
    ),
    _spec(
        "binary_cross_entropy_with_logits",
        "BCEWithLogitsLoss",
        _binary_cross_entropy_with_logits,
        _logit_pair,
        others=lambda make: _constant_weights(make, "weight", "pos_weight"),
        weight=torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]),
        pos_weight=torch.tensor([2.0, 0.5, 1.0, 4.0, 3.0]),
        reduction="none",
    ),
    _spec(
        "kl_div",
        "KLDivLoss",
        _kl_div,
        _logit_pair,
        {"reduction": "batchmean"},
        others=lambda make: {"log_target": True},
        reduction="batchmean",
        log_target=True,
    ),
    _spec(
        "gaussian_nll_loss",
        "GaussianNLLLoss",
        _gaussian_nll_loss,
        lambda make, shape: (*_pair(make, shape), make.tensor(*shape, low=0.1, high=2)),
        others=lambda make: {"full": True},
        full=True,
        eps=0.7,
        reduction="sum",
    ),
    _spec(
        "poisson_nll_loss",
        "PoissonNLLLoss",
        _poisson_nll_loss,
        _pair,
        others=lambda make: {"full": True, "log_input": False},
        inputs=_rates,
        log_input=False,
        full=True,
        eps=0.1,
        reduction="sum",
    ),
]
