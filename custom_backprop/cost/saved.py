"""The bytes that autograd saves."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from ..backends.selection import watch_saved
from ..conversions.deferred import Deferred
from .operators import address
from .report import Layer
from .where import Where

#: the names of the functions of losses: they reduce
LOSSES = {
    name
    for name in functional.__all__
    if "reduction" in signature(getattr(functional, name)).parameters
}


def count_saved(model: nn.Module, where: Where) -> watch_saved:
    """Counts what is saved in a block. Without a mode, as in training: where nobody watches, our
    Functions may save other tensors."""
    saved = {address(t): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}

    def count(t: Tensor) -> None:
        if address(t) not in saved:
            # alive, so that no other storage takes its address
            saved[address(t)] = t.untyped_storage()
            where.layer().saved_bytes += t.untyped_storage().nbytes()

    return watch_saved(count)


@dataclass
class Function:
    """A function that a model calls: the name of ours that ran, or None if torch's did, and the
    bytes that it saves for backward."""

    ours: str | None
    saved: int


class Losses(TorchFunctionMode):
    """Makes a layer of each loss function. Whatever is called runs as if there were no mode."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where
        self.found: dict[str, str | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in LOSSES:
            return func(*args, **kwargs)
        self.where.layers.setdefault(name, Layer(name))
        with self.where.at(name):
            result = func(*args, **kwargs)
        logits = args[0] if args else kwargs.get("input")
        if isinstance(logits, Deferred) and not logits.is_made():
            self.found[name] = "linear_cross_entropy"
        else:
            self.found[name] = name if func is getattr(functional, name) else None
        return result
