"""Specs of the gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

#: rows, features, hidden units
SIZES = {
    "awkward": (37, 20, 70),
    "small": (64, 16, 64),
    "medium": (256, 64, 256),
    "large": (1024, 256, 1024),
    "huge": (8192, 2048, 8192),
}


def _reference(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By stock's linear layers, activation and product."""

    def reference(
        input, gate_weight, up_weight, down_weight, gate_bias=None, up_bias=None, down_bias=None,
        recompute=False, **options,
    ):  # fmt: skip
        a, b = F.linear(input, gate_weight, gate_bias), F.linear(input, up_weight, up_bias)
        return F.linear(f(a, **options) * b, down_weight, down_bias)

    return reference


def _tensors(make: Make, *shapes: tuple[int, ...], trained: bool = True) -> tuple[Tensor, ...]:
    return tuple(make.tensor(*shape, low=-1, high=1, requires_grad=trained) for shape in shapes)


def _weights(make: Make, features: int, hidden: int, **named: bool) -> tuple[Tensor, ...]:
    return _tensors(make, *[(hidden, features)] * 2, (features, hidden), **named)


def _biases(make: Make, features: int, hidden: int, **named: bool) -> tuple[Tensor, ...]:
    return _tensors(make, (hidden,), (hidden,), (features,), **named)


# few numbers, as gradcheck calls the function for each; and not all of them are trained, as there
# are 128 subsets of seven gradients
def _samples(make: Make, name: str, options: dict[str, Any]) -> Iterator[Sample]:
    if name == "geglu_mlp":
        options = {**options, "recompute": True}
        yield Sample((make.tensor(2, 1), *_weights(make, 1, 2)), options, name="recompute")
        return
    yield Sample((make.tensor(2, 1), *_weights(make, 1, 3)), name="2-D")
    frozen = _weights(make, 1, 2, trained=False)
    yield Sample(
        (make.tensor(1, 2, 1), *frozen, *_biases(make, 1, 2)),
        {"recompute": True},
        name="3-D, recompute, only biases trained",
    )
    biases = _biases(make, 1, 1, trained=False)
    yield Sample((make.tensor(1), *_weights(make, 1, 1), *biases), name="1-D")
    biases = _biases(make, 2, 3, trained=False)
    yield Sample((make.tensor(0, 2), *_weights(make, 2, 3), *biases), name="no rows")


def _large(make: Make, size: str) -> Sample:
    rows, features, hidden = SIZES[size]
    return Sample((make.tensor(rows, features), *_weights(make, features, hidden)))


class _Stock(torch.nn.Module):
    """The same layers, one after another."""

    def __init__(self, dim, hidden, bias=False, approximate=None):
        super().__init__()
        self.gate_proj = torch.nn.Linear(dim, hidden, bias)
        self.up_proj = torch.nn.Linear(dim, hidden, bias)
        self.down_proj = torch.nn.Linear(hidden, dim, bias)
        self.approximate = approximate

    def forward(self, input):
        a = self.gate_proj(input)
        f = F.silu(a) if self.approximate is None else F.gelu(a, approximate=self.approximate)
        return self.down_proj(f * self.up_proj(input))


def _spec(
    name: str, f: str, reference: Callable[..., Tensor], module: type, options: dict[str, Any]
) -> OpSpec:
    sizes = {"dim": 4, "hidden": 6}
    return OpSpec(
        name=name,
        family="mlp",
        formula=f"y = ({f}(a) b) Wdᵀ, a = x Wgᵀ, b = x Wuᵀ;  dh = dy Wd, da = dh b {f}'(a), "
        f"db = dh {f}(a), dx = da Wg + db Wu",
        function=getattr(functional, name),
        reference=_reference(reference),
        samples=lambda make: _samples(make, name, options),
        launches=(4, 9),
        large=_large,
        module=(
            module, _Stock, {**sizes, "bias": True, **options}, lambda make: (make.tensor(2, 3, 4),)
        ),
    )  # fmt: skip


SPECS = [
    _spec("swiglu_mlp", "silu", F.silu, nn.SwiGLUMLP, {}),
    _spec("geglu_mlp", "gelu", F.gelu, nn.GEGLUMLP, {"approximate": "tanh"}),
]
