"""The bytes that an op moves, seen in Triton's interpreter, against the fewest possible.

The time of a memory-bound op is its traffic over the bandwidth of the memory, so this is a figure
of merit that needs no GPU and has no noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import use_backend
from .accesses import Access, watched
from .case import outputs, weights_for
from .spec import Make, OpSpec

#: a memory-bound op may move this many times its floor
LIMIT = 1.05

#: a tensor so many times smaller than the largest of its launch stays in a cache: however often it
#: is read, it counts once
_CACHED = 16


@dataclass(frozen=True)
class Traffic:
    """What an op moved in one direction.

    Attributes:
        moved: bytes that its kernels loaded and stored.
        floor: bytes of what forward reads and returns or saves, each once; or of what backward gets
            and returns.
        flops: of matrix products. An op that has any is not memory-bound.
    """

    op: str
    direction: str
    moved: int
    floor: int
    flops: int

    @property
    def ratio(self) -> float:
        return self.moved / max(1, self.floor)

    @property
    def is_memory_bound(self) -> bool:
        return not self.flops

    @property
    def faults(self) -> list[str]:
        """Why this is not good enough to ship; empty if it is."""
        if not self.is_memory_bound or self.ratio <= LIMIT:
            return []
        return [f"moved {self.ratio:.2f} times as many bytes as it must; {LIMIT} are allowed"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "faults": self.faults}


class _Moved:
    """The bytes of one launch."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        sizes = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
        }
        self.starts = np.array(sorted(sizes), np.int64)
        self.sizes = np.array([sizes[start] for start in self.starts], np.int64)
        self.loaded, self.stored = np.zeros((2, len(sizes)), np.int64)

    def access(self, access: Access) -> np.ndarray:
        owner = np.searchsorted(self.starts, access.addresses, "right") - 1
        if access.kind != "atomic":
            count = self.stored if access.kind == "store" else self.loaded
            count += access.size * np.bincount(owner, minlength=len(count))
        return np.ones(access.addresses.shape, bool)

    @property
    def bytes(self) -> int:
        cached = self.sizes * _CACHED <= self.sizes.max(initial=0)
        loaded = np.where(cached, np.minimum(self.loaded, self.sizes), self.loaded)
        return int(loaded.sum() + self.stored.sum())


def traffic(spec: OpSpec, size: str = "medium") -> list[Traffic]:
    """The traffic of an op's forward, with a gradient wanted, and of its backward; nothing if it
    launches no kernel.

    Args:
        size: of ``spec.large``, in float32.

    Raises:
        RuntimeError: the interpreter is off.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    sample = spec.large(Make("cpu", torch.float32), size)
    given = [a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, Tensor)]
    with FlopCounterMode(display=False) as counter, use_backend("formula"), torch.no_grad():
        spec.function(*sample.args, **sample.kwargs)
    moved: list[int] = []
    with use_backend("triton"), watched(_Moved, lambda _, launch: moved.append(launch.bytes)):
        results = outputs(spec.function(*sample.args, **sample.kwargs))
        saved = saved_by(results)
        forward = sum(moved)
        dys = [  # of a loss 1, as in loss.backward()
            w if y.dim() else torch.ones_like(y)
            for y, w in zip(results, weights_for(results), strict=True)
        ]
        leaves = [t for t in given if t.requires_grad]
        grads = torch.autograd.grad(results, leaves, dys)
    if not sum(moved):
        return []
    floors = floors_of(spec, given, results, saved, dys, grads)
    flops = counter.get_total_flops()
    return [
        Traffic(spec.name, "forward", forward, floors["forward"], flops),
        Traffic(spec.name, "backward", sum(moved) - forward, floors["backward"], flops),
    ]


def floors_of(
    spec: OpSpec,
    given: Sequence[Tensor],
    results: Sequence[Tensor],
    saved: Sequence[Tensor],
    dys: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> dict[str, int]:
    """The fewest bytes of a call that got, returned and saved these tensors: of "forward",
    "backward", and "inference", which is forward without a gradient."""
    made = _distinct([*results, *saved])
    floors = {
        "inference": _bytes(_distinct(given) | _distinct(results)),
        "forward": _bytes(_distinct(given) | made),
        "backward": _bytes(_distinct([*dys, *saved])) + _bytes(_distinct(grads)),
    }
    if spec.read_twice:
        floors["inference"] += _bytes(_distinct(given))
        floors["forward"] += _bytes(_distinct(given))
        floors["backward"] += _bytes(_distinct([*dys, *saved]))
    if all(key in made for key in _distinct(grads)):  # a loss makes its gradient in forward
        floors["backward"] = _bytes(_distinct(dys))
    return floors


def saved_by(results: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that the graph of these results saves."""
    found: list[Tensor] = []
    waiting: list[Any] = [y.grad_fn for y in results]
    while waiting:
        node = waiting.pop()
        found += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
        waiting += [n for n, _ in node.next_functions if n is not None]
    return found


def _distinct(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes."""
    return {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _bytes(distinct: dict[int, int]) -> int:
    return sum(distinct.values())
