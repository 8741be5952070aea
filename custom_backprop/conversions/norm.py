"""RMS norms of language models: modules with a ``weight`` alone, whose classes differ in the name
of ε, in where half precision is rounded, and in whether w stands for 1 + w. Which it is, a probe
says."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .. import functional as F
from ..backends.selection import is_autocast
from ..formulas import norm as formula
from . import probe
from .generated import subclass

#: the names of ε
EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class RMSNorm:
    """By :func:`custom_backprop.functional.rms_norm`, unless the dtypes of input and weight differ
    and no probe found that theirs rounds then as ours does (``mixed``)."""

    casting: str
    epsilon: str
    mixed: bool

    def __call__(self, base: Any) -> dict[str, Any]:
        casting, epsilon, mixed = self.casting, self.epsilon, self.mixed

        @functools.wraps(base.forward)
        def forward(self, *args, **named):
            if named or len(args) != 1 or not (mixed or args[0].dtype == self.weight.dtype):
                return base.forward(self, *args, **named)
            (x,), w = args, self.weight
            given = x, w.shape, w, getattr(self, epsilon), casting
            if is_autocast(x):  # it would cast the input where theirs goes by its dtype
                with torch.autocast(x.device.type, enabled=False):
                    return F.rms_norm(*given)
            return F.rms_norm(*given)

        return {"forward": forward}


def counterpart(module: torch.nn.Module) -> type | str | None:
    """The class of ours, why there is none, or None for what is no such norm."""
    cls: Any = type(module)
    weight = module._parameters.get("weight")
    if not ("RMSNorm" in cls.__name__ or cls.__name__.endswith("LayerNorm")):
        return None
    epsilons = [n for n in EPSILONS if isinstance(getattr(module, n, None), float)]
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or weight.dim() != 1 or not alone or len(epsilons) != 1:
        return None
    eps = getattr(module, epsilons[0])
    for casting in formula.CASTINGS:
        if all(_agree(module, eps, casting, *dtypes) for dtypes in probe.SAME):
            mixed = all(_agree(module, eps, casting, *dtypes) for dtypes in probe.MIXED)
            return subclass(cls, RMSNorm(casting, epsilons[0], mixed))
    return "an RMSNorm by its name, but computes or rounds otherwise"


def _agree(module, eps, casting, of_input, of_weight):
    n, device = module.weight.numel(), probe.device_of(module)
    x = probe.numbers(max(4, 512 // n), n, device=device, dtype=of_input)
    w = probe.numbers(n, device=device, dtype=of_weight, seed=1)
    theirs = probe.bare(module, weight=torch.nn.Parameter(w))

    def ours():
        return formula.norm(x, w, None, eps, casting)[0]

    with torch.no_grad():
        if not probe.agree(lambda: theirs(x), ours):
            return False
        # a rounding more or elsewhere changes many of the last bits
        return bool((theirs(x) != ours()).float().mean() < 0.02 or of_input == torch.float32)
