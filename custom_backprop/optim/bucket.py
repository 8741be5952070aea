"""Parameters that one call updates together, and what must still hold for last step's lists to be
used again.

Asking Python for a hundred parameters, gradients and states takes longer than updating them. So the
lists are kept, and each step looks
only whether they are still the truth: the same parameters, at the same addresses where these are
kept, and gradients of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends.kernels import kernels
from ..dtensor import local
from ..formulas.precision import HALF
from .guards import guard
from .threads import SMALL, Run, by_all_threads, by_one_thread

#: a tensor of more elements is updated in pieces of as many a thread, which stay in a core's cache;
#: smaller ones share a piece
PIECE = 2**18
#: a call of its own for the small tensors among others pays for itself from this many on
MANY = 8

_dtype, _layout, _shape, _version = map(attrgetter, ("dtype", "layout", "shape", "_version"))


def flat(t: Tensor) -> Tensor:
    """All elements of a dense tensor of any strides as a 1-D view, in the order of memory. It
    shares ``t``'s version counter."""
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def same_order(t: Tensor, p: Tensor) -> bool:
    """Whether the elements of ``t`` lie in memory as they are, and in the order of those of ``p``,
    which is dense and of the same shape."""
    return (
        t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous())
    ) and not t.is_neg()


def in_order(t: Tensor, p: Tensor) -> Tensor:
    """``t``, or a copy of it, in the order of ``p``."""
    return t if same_order(local(t), local(p)) else torch.empty_like(p, dtype=t.dtype).copy_(t)


def norm(grad: Tensor) -> Tensor:
    """The 2-norm of one gradient of any kind: sparse, complex, or spread over ranks."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    total = torch.linalg.vector_norm(grad, dtype=_norm_dtype(grad.dtype))
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def _norm_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in HALF else None


class Piece:
    """A part of a bucket small enough for the cache: several whole tensors, or a part of one.

    Attributes:
        params: flat parameters.
        states: by name, flat state of each parameter.
        homes: by name, one tensor over all of ``states[name]``, where they are adjacent.
        scratch: two flat tensors to compute in, which all pieces of a bucket share.
        run: calls a fused kernel on lists of this piece, with as many threads as its tensors are
            worth.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: dict[str, list[Tensor]],
        tensors: slice,
        elements: slice | None,
        scratch: list[Tensor],
    ) -> None:
        self._tensors, self._elements = tensors, elements
        self.params = self.part(params)
        self.states = {
            name: t[self._tensors] if name == "step" else self.part(t) for name, t in states.items()
        }
        self.homes = {name: _home(t) for name, t in self.states.items() if _adjacent(t)}
        sizes = list(map(Tensor.numel, self.params))
        self.scratch = [t[: sum(sizes)] for t in scratch]
        self._views = list(self.scratch[0].split(sizes))
        self.run = by_one_thread if sum(sizes) <= SMALL * len(sizes) else by_all_threads

    def part(self, tensors: list[Tensor]) -> list[Tensor]:
        """This piece's part of a list with one contiguous tensor a parameter."""
        mine = tensors[self._tensors]
        return mine if self._elements is None else [mine[0].view(-1)[self._elements]]

    def joined(self, tensors: list[Tensor], scratch: int = 0) -> Tensor:
        """The same as one flat tensor, not to be written: of several a copy in ``scratch``, of one
        a view."""
        mine = self.part(tensors)
        return (
            mine[0].view(-1)
            if len(mine) == 1
            else torch.cat([t.view(-1) for t in mine], out=self.scratch[scratch])
        )

    def scaled(self, tensors: list[Tensor], factor: float) -> list[Tensor]:
        """This piece's part in ``scratch[0]``, every element times ``factor``."""
        torch.mul(self.joined(tensors), factor, out=self.scratch[0])
        return self._views

    def subtract(self, update: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """θ -= γ (u + λ θ), where u is ``scratch[0]`` or the home of a state."""
        if len(self.params) == 1 and not weight_decay:
            self.params[0].add_(update, alpha=-lr)
            return
        views = next(
            (self.states[name] for name, home in self.homes.items() if home is update), self._views
        )
        self.run(  # of a step without momentum, torch's fused kernel rounds as add_ does
            torch._fused_sgd_, self.params, views, [], weight_decay=weight_decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False,
        )  # fmt: skip


class Part:
    """Those tensors of a bucket that a fused kernel is to walk through alike: the small ones, or
    the others."""

    def __init__(
        self,
        params: list[Tensor],
        states: dict[str, list[Tensor]],
        which: list[int] | None,
        run: Run,
    ) -> None:
        self._which, self.run = which, run
        self.params = self.of(params)
        self.states = {name: self.of(tensors) for name, tensors in states.items()}

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """This part of a list with one tensor a parameter."""
        return tensors if self._which is None else [tensors[i] for i in self._which]


def _home(tensors: list[Tensor]) -> Tensor:
    """The tensor over ``tensors``, which lie one behind the other in one storage."""
    first = next((t for t in tensors if t.numel()), tensors[0])
    return first.as_strided((sum(map(Tensor.numel, tensors)),), (1,))


def _adjacent(tensors: list[Tensor]) -> bool:
    """Whether dense tensors lie one behind the other in one storage. (Empty ones have no
    address.)"""
    storage, end = 0, 0
    for t in tensors:
        if t.numel():
            if not storage:
                storage, end = t.untyped_storage().data_ptr(), t.data_ptr()
            if t.untyped_storage().data_ptr() != storage or t.data_ptr() != end:
                return False
            end += t.numel() * t.element_size()
    return True


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Equal tensors of the same shapes and strides that lie one behind the other in one storage;
    the same ones if they do already."""
    if _adjacent(tensors):
        return tensors
    home = torch.cat(list(map(flat, tensors)))
    views, start = [], 0
    for t in tensors:
        views.append(home.as_strided(t.size(), t.stride(), start))
        start += t.numel()
    return views


def gaps(tensors: list[Tensor]) -> set[int]:
    """The places in the list of those tensors that do not lie right behind the one before them.
    (Empty ones have no address.)"""
    found, last = set(), None
    for i, t in enumerate(tensors):
        if t.numel():
            if last is not None and not _adjacent([last, t]):
                found.add(i)
            last = t
    return found


def runs(
    tensors: list[Tensor], together: bool, apart: Collection[int] = ()
) -> Iterator[tuple[slice, slice | None]]:
    """How a list of tensors is cut into pieces: (which tensors, which elements of the one that is
    too large for one piece).

    A new piece begins at each place of ``apart``.

    Half precision is not put together: ATen computes the last few elements of a tensor, those that
    fill no vector, with other roundings.
    """
    limit = PIECE if together and tensors[0].dtype in (torch.float32, torch.float64) else 0
    begin, total = 0, 0
    for i, t in enumerate(tensors):
        n = t.numel()
        if begin < i and (total + n > limit or i in apart):
            yield slice(begin, i), None
            begin, total = i, 0
        if n > PIECE:
            size = PIECE * torch.get_num_threads()
            for start in range(0, n, size):
                yield slice(i, i + 1), slice(start, min(start + size, n))
            begin = i + 1
        else:
            total += n
    if begin < len(tensors):
        yield slice(begin, len(tensors)), None


class Bucket:
    """Parameters alike in kind, device and dtypes.

    Attributes:
        params: the parameters, of ``dtype``.
        backend: what updates them.
        flats_dtype: the dtype of ``flats``.
        states: by name, the flat state of each parameter.
        steps: how many steps each has made, one tensor over ``states["step"]``; None if no state
            counts them, or they lie apart.
        fresh: the states were made for this step and hold nothing yet.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: dict[str, list[Tensor]],
        masters: list[Tensor] | None,
        backend: str,
        fresh: bool,
        together: bool,
        adjacent: tuple[str, ...] = (),
    ) -> None:
        self.params, self.backend, self.fresh = params, backend, fresh
        self._together, self._adjacent = together, adjacent
        shards = list(map(local, params))
        self.device, self.dtype = shards[0].device, shards[0].dtype
        self._masters = None if masters is None else [flat(local(m)) for m in masters]
        self.flats_dtype = self.dtype if self._masters is None else self._masters[0].dtype
        self.states = {name: [flat(local(t)) for t in tensors] for name, tensors in states.items()}
        self.steps = (
            _home(self.states["step"])
            if "step" in states and _adjacent(self.states["step"])
            else None
        )
        self._table: Any = None
        self._sharded = shards[0] is not params[0]
        self._type = type(grads[0])
        self._dtypes = {grads[0].dtype}
        self._placements = [getattr(p, "placements", None) for p in params]
        self._pointers = list(map(Tensor.data_ptr, shards))
        self._held = False  # tensors are kept that lie at these addresses
        self._contiguous = all(map(Tensor.is_contiguous, shards))
        self._shapes, self._strides = list(map(_shape, shards)), list(map(Tensor.stride, shards))
        self._relaid = not all(map(same_order, map(local, grads), shards))
        self._guarded = not self._sharded
        self._alike: Callable[..., bool] | None = None
        self._others = False  # the last step's gradients were not such as ``_alike`` knows
        self._written: list[int] | None = None  # versions of ``rounded`` after the last step

    def grads(self) -> list[Tensor] | None:
        """This step's gradients, contiguous; None if they or the parameters are not of the kind
        that this bucket was made for."""
        params = self.params
        grads: list[Any] = [p.grad for p in params]
        if self._alike is not None and self._alike(*params, *grads):
            self._others = False
            if self._held and list(map(Tensor.data_ptr, params)) != self._pointers:
                return None
        else:
            if (known := self._looked_at(grads)) is None:
                return None
            if self._guarded:
                if self._others:  # twice running: they will stay so
                    self._alike = guard([*params, *grads])
                    self._guarded = self._alike is not None
                self._others = not self._others
            grads = known
        if self._relaid:
            grads = list(map(in_order, grads, map(local, params)))
        return grads if self._contiguous else list(map(flat, grads))

    def _looked_at(self, grads: list[Any]) -> list[Tensor] | None:
        """What this rank holds of the gradients; None for the same reasons."""
        if {*map(type, grads)} != {self._type}:
            return None
        params = self.params
        if self._sharded:
            if [g.placements for g in grads] != self._placements:
                return None
            params, grads = list(map(local, params)), list(map(local, grads))
        if (
            {*map(_dtype, grads)} != self._dtypes
            or {*map(_layout, grads)} != {torch.strided}
            or list(map(Tensor.data_ptr, params)) != self._pointers
            or list(map(_shape, params)) != self._shapes
            or list(map(_shape, grads)) != self._shapes
            or (
                not all(map(Tensor.is_contiguous, params))
                if self._contiguous
                else list(map(Tensor.stride, params)) != self._strides
            )
        ):
            return None
        if self._relaid:
            return grads
        laid = (
            all(map(Tensor.is_contiguous, grads))
            if self._contiguous
            else list(map(Tensor.stride, grads)) == self._strides
        )
        return grads if laid and not any(map(Tensor.is_neg, grads)) else None

    @cached_property
    def _flat_params(self) -> list[Tensor]:
        """The parameters, flat. Once they are made, a parameter at another address is not of this
        bucket any more."""
        shards = list(map(local, self.params))
        self._pointers, self._held = list(map(Tensor.data_ptr, shards)), True
        return list(map(flat, shards))

    @property
    def flats(self) -> list[Tensor]:
        """The flat tensors that are updated: the parameters, or their float32 masters."""
        return self._flat_params if self._masters is None else self._masters

    @property
    def rounded(self) -> list[Tensor] | None:
        """The flat parameters that are rounded from the masters; None where there are none."""
        return None if self._masters is None else self._flat_params

    def refresh_masters(self) -> None:
        """Where somebody else has written to a parameter since the last step, its master takes the
        new value."""
        if self.rounded is not None and self._written != list(map(_version, self.rounded)):
            for master, low in zip(self.flats, self.rounded, strict=True):
                master.copy_(torch.where(master.to(low.dtype) == low, master, low.to(master.dtype)))

    def note_versions(self) -> None:
        """To be called when a step has written all parameters."""
        if self.rounded is not None:
            self._written = list(map(_version, self.rounded))

    @cached_property
    def parts(self) -> list[Part]:
        """Small tensors and others, each in their order; all together where only few are small."""
        if self._contiguous and self._masters is None and not self._sharded:
            params = self.params  # at whatever address
        elif self._contiguous:  # the shapes of the gradients, as :meth:`grads` returns them
            params = [t.view(shape) for t, shape in zip(self.flats, self._shapes, strict=True)]
        else:
            params = self.flats
        sizes = list(map(Tensor.numel, params))
        small = [i for i, n in enumerate(sizes) if n <= SMALL]
        if MANY <= len(small) < len(sizes):
            large = [i for i, n in enumerate(sizes) if n > SMALL]
            return [
                Part(params, self.states, small, by_one_thread),
                Part(params, self.states, large, by_all_threads),
            ]
        return [
            Part(
                params,
                self.states,
                None,
                by_one_thread if len(small) == len(sizes) else by_all_threads,
            )
        ]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The same cut for the cache, so that in each piece the states that the update wants so are
        adjacent."""
        apart = set().union(
            *(gaps(self.states[name]) for name in self._adjacent if name in self.states)
        )
        cuts = list(runs(self.flats, self._together, apart))
        sizes = [
            sum(t.numel() for t in self.flats[which]) if part is None else part.stop - part.start
            for which, part in cuts
        ]
        scratch = [self.flats[0].new_empty(max(sizes)) for _ in range(2)]
        return [Piece(self.flats, self.states, which, part, scratch) for which, part in cuts]

    def count(self, made: Tensor | int) -> None:
        """Adds the steps made, one or none, to every parameter's count."""
        if self.steps is not None:
            self.steps.add_(made)
        elif "step" in self.states:
            torch._foreach_add_(self.states["step"], made)

    def scaled(
        self, grads: list[Tensor], factor: float
    ) -> Iterator[tuple[Run, list[Tensor], list[Tensor], dict[str, list[Tensor]]]]:
        """(who calls it, parameters, gradients times ``factor``, states) for torch's fused kernels:
        in pieces where they are scaled."""
        if factor == 1:
            for part in self.parts:
                yield part.run, part.params, part.of(grads), part.states
        else:
            for piece in self.pieces:
                yield piece.run, piece.params, piece.scaled(grads, factor), piece.states

    def norms(self, grads: list[Tensor]) -> list[Tensor]:
        """2-norms whose 2-norm is that of all gradients together."""
        if self._sharded:
            return [norm(p.grad) for p in self.params if p.grad is not None]
        if self.device.type == "cpu" and self._dtypes == {self.flats_dtype}:
            return [
                torch.linalg.vector_norm(piece.joined(grads), dtype=_norm_dtype(self.dtype))
                for piece in self.pieces
            ]
        return list(torch._foreach_norm(grads, 2.0, dtype=_norm_dtype(self.dtype)))

    def table(self, slots: tuple[str, ...]) -> Any:
        """The kernels' table of this bucket, with states in the order of ``slots``."""
        if self._table is None:
            states = [self.states.get(name) for name in slots]
            self._table = kernels("optim").Table(self._flat_params, states, self._masters)
        return self._table
