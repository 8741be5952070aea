"""Parameters that one call updates together. What a step needs to know about them is computed once
and used again while their signature matches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends.kernels import kernels
from ..dtensor import local
from .clipping import norm, norm_dtype
from .memory import adjacent, flat, gaps, span
from .pieces import Part, Piece, States, parts_of, pieces_of
from .signature import Signature
from .threads import Run

_version = attrgetter("_version")


class Bucket:
    """Parameters of the same kind, device and dtypes.

    Args:
        params: the parameters.
        grads: their gradients.
        states: by name, the state of each parameter.
        masters: float32 copies from which the parameters are rounded, or None.
        backend: the name of the backend that updates them.
        fresh: the states were created for this step and are still empty.
        together: small parameters may share a piece.
        packed: the names of states that have to be adjacent in a piece.

    Attributes:
        states: the same as flat tensors, on this rank.
        steps: how many steps each has made, one tensor over ``states["step"]``; None if no state
            counts steps, or these states are not adjacent.
        updated_dtype: of the tensors that are updated: the parameters or their masters.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: States,
        masters: list[Tensor] | None,
        backend: str,
        *,
        fresh: bool,
        together: bool,
        packed: tuple[str, ...] = (),
    ) -> None:
        self.params, self.backend, self.fresh = params, backend, fresh
        self._together, self._packed = together, packed
        shards = list(map(local, params))
        self.device, self.dtype = shards[0].device, shards[0].dtype
        self._masters = None if masters is None else [flat(local(m)) for m in masters]
        self.updated_dtype = self.dtype if self._masters is None else self._masters[0].dtype
        self.states = {name: [flat(local(t)) for t in tensors] for name, tensors in states.items()}
        counts = self.states.get("step")
        self.steps = span(counts) if counts and adjacent(counts) else None
        self._signature = Signature(params, shards, grads)
        self.grads = self._signature.grads  # one Python frame less per step
        self._table: Any = None
        self._written: list[int] | None = None  # versions of ``rounded`` after the last step

    @cached_property
    def _flat_params(self) -> list[Tensor]:
        shards = list(map(local, self.params))
        self._signature.pin(shards)
        return list(map(flat, shards))

    @property
    def updated(self) -> list[Tensor]:
        """The flat tensors that are updated: the parameters, or their float32 masters."""
        return self._flat_params if self._masters is None else self._masters

    @property
    def rounded(self) -> list[Tensor] | None:
        """The flat parameters that are rounded from masters; None if there are none."""
        return None if self._masters is None else self._flat_params

    def refresh_masters(self) -> None:
        """If a parameter was changed by somebody else since the last step, its master takes the new
        value."""
        if self.rounded is not None and self._written != list(map(_version, self.rounded)):
            for master, low in zip(self.updated, self.rounded, strict=True):
                master.copy_(torch.where(master.to(low.dtype) == low, master, low.to(master.dtype)))

    def note_versions(self) -> None:
        """Call this when a step has written all parameters."""
        if self.rounded is not None:
            self._written = list(map(_version, self.rounded))

    @cached_property
    def parts(self) -> list[Part]:
        """The small tensors, and the others."""
        if not self._signature.contiguous:
            return parts_of(self.updated, self.states)
        if self._masters is None and not self._signature.sharded:
            return parts_of(self.params, self.states)  # valid at any address
        shaped = zip(self.updated, self._signature.shapes, strict=True)
        return parts_of([t.view(shape) for t, shape in shaped], self.states)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The same, cut for the cache. States that have to be adjacent are adjacent in each
        piece."""
        apart = [gaps(self.states[name]) for name in self._packed if name in self.states]
        return pieces_of(self.updated, self.states, self._together, set().union(*apart))

    def count(self, made: Tensor | int) -> None:
        """Adds the number of steps made, 1 or 0, to the count of every parameter."""
        if self.steps is not None:
            self.steps.add_(made)
        elif "step" in self.states:
            torch._foreach_add_(self.states["step"], made)

    def scaled(
        self, grads: list[Tensor], factor: float
    ) -> Iterator[tuple[Run, list[Tensor], list[Tensor], States]]:
        """(what calls the kernel, parameters, gradients times ``factor``, states) for torch's fused
        kernels; in pieces, if gradients are scaled."""
        if factor == 1:
            for part in self.parts:
                yield part.run, part.params, part.of(grads), part.states
        else:
            for piece in self.pieces:
                yield piece.run, piece.params, piece.scaled(grads, factor), piece.states

    def norms(self, grads: list[Tensor]) -> list[Tensor]:
        """Several 2-norms, whose 2-norm is that of all gradients together."""
        if self._signature.sharded:
            return [norm(p.grad) for p in self.params if p.grad is not None]
        dtype = norm_dtype(self._signature.dtype)
        if self.device.type == "cpu" and self._signature.dtype == self.updated_dtype:
            flats = (piece.joined(grads) for piece in self.pieces)
            return [torch.linalg.vector_norm(d, dtype=dtype) for d in flats]
        return list(torch._foreach_norm(grads, 2.0, dtype=dtype))

    def table(self, slots: tuple[str, ...]) -> Any:
        """The kernels' table of this bucket, with states in the order of ``slots``."""
        if self._table is None:
            states = [self.states.get(name) for name in slots]
            self._table = kernels("optim").Table(self._flat_params, states, self._masters)
        return self._table
