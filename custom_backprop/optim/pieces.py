"""How the update of a bucket on a CPU is divided: into pieces that fit the cache, and into small
tensors, which one thread updates, and others."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..formulas.precision import HALF
from .memory import adjacent, span
from .threads import SMALL, Run, by_all_threads, by_one_thread, operators_by_one_thread

#: how many elements fit in a core's cache: a larger tensor is updated in pieces of that many per
#: thread, smaller ones share a piece
PIECE = 2**18
#: from this number on, small tensors among others are worth a separate call
MANY = 8
#: a piece of no more elements is updated by one thread where the update is several operators. Two
#: threads gain a tenth at best, and cost half as much again while they wait for each other
ALONE = 2**16

States = dict[str, list[Tensor]]
#: which tensors of a list, and which elements of a tensor that is too large for one piece
Cut = tuple[slice, slice | None]


class Part:
    """The tensors of a bucket that a fused kernel updates in one call: the small ones, or the
    others.

    Attributes:
        run: calls the kernel.
    """

    def __init__(
        self, params: list[Tensor], states: States, which: list[int] | None, run: Run
    ) -> None:
        self._which, self.run = which, run
        self.params = self.of(params)
        self.states = {name: self.of(tensors) for name, tensors in states.items()}

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """This part of a list with one tensor per parameter."""
        return tensors if self._which is None else [tensors[i] for i in self._which]


def parts_of(params: list[Tensor], states: States) -> list[Part]:
    """Small tensors and others, each in their order; all in one part if only few are small."""
    sizes = list(map(Tensor.numel, params))
    small = [i for i, n in enumerate(sizes) if n <= SMALL]
    if MANY <= len(small) < len(sizes):
        large = [i for i, n in enumerate(sizes) if n > SMALL]
        return [
            Part(params, states, small, by_one_thread),
            Part(params, states, large, by_all_threads),
        ]
    run = by_one_thread if len(small) == len(sizes) else by_all_threads
    return [Part(params, states, None, run)]


class Piece:
    """A part of a bucket small enough for the cache: several whole tensors, or a part of one.

    Attributes:
        params: flat parameters.
        states: by name, the flat state of each parameter.
        whole: by name, one tensor over all of ``states[name]``, if they are adjacent.
        scratch: two flat tensors for intermediate results, shared by all pieces of a bucket.
        run: calls a fused kernel with one thread or with all of them.
        run_operators: the same for a function that calls several operators.
    """

    def __init__(
        self, params: list[Tensor], states: States, cut: Cut, scratch: list[Tensor]
    ) -> None:
        self._tensors, self._elements = cut
        self.params = self.of(params)
        self.states = {
            name: t[self._tensors] if name == "step" else self.of(t) for name, t in states.items()
        }
        self.whole = {name: span(t) for name, t in self.states.items() if adjacent(t)}
        sizes = list(map(Tensor.numel, self.params))
        self.scratch = [t[: sum(sizes)] for t in scratch]
        self._views = list(self.scratch[0].split(sizes))
        self.run = by_one_thread if sum(sizes) <= SMALL * len(sizes) else by_all_threads
        alone = sum(sizes) <= ALONE
        self.run_operators = operators_by_one_thread if alone else by_all_threads

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """This piece of a list with one contiguous tensor per parameter."""
        mine = tensors[self._tensors]
        return mine if self._elements is None else [mine[0].view(-1)[self._elements]]

    def joined(self, tensors: list[Tensor], scratch: int = 0) -> Tensor:
        """The same as one flat tensor, for reading only: a view of a single tensor, or a copy of
        several in ``scratch``."""
        mine = self.of(tensors)
        if len(mine) == 1:
            return mine[0].view(-1)
        return torch.cat([t.view(-1) for t in mine], out=self.scratch[scratch])

    def scaled(self, tensors: list[Tensor], factor: float) -> list[Tensor]:
        """This piece of a list times ``factor``, in ``scratch[0]``."""
        torch.mul(self.joined(tensors), factor, out=self.scratch[0])
        return self._views

    def direction(self, grads: list[Tensor], factor: float) -> Tensor:
        """This piece's gradients times ``factor``, flat, for reading only."""
        d = self.joined(grads)
        return d if factor == 1 else torch.mul(d, factor, out=self.scratch[0])

    def subtract(self, update: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """θ -= γ (u + λ θ), where u is in ``whole``, or is ``scratch[0]``, which may be
        overwritten."""
        p = self.params[0]
        if p.dtype in HALF and weight_decay:  # torch's kernel does nothing (pytorch issue 191763)
            update, weight_decay = update.add_(p, alpha=weight_decay), 0.0
        if len(self.params) == 1 and not weight_decay:
            p.add_(update, alpha=-lr)
            return
        name = next((name for name, whole in self.whole.items() if whole is update), None)
        self.run(  # without momentum, torch's fused kernel rounds as add_ does
            torch._fused_sgd_, self.params, self._views if name is None else self.states[name], [],
            weight_decay=weight_decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False,
        )  # fmt: skip


def pieces_of(
    params: list[Tensor], states: States, together: bool, apart: Collection[int]
) -> list[Piece]:
    """``params`` in pieces that fit the cache. No piece crosses an index of ``apart``."""
    every = list(cuts(params, together, apart))
    largest = max(
        sum(t.numel() for t in params[which]) if part is None else part.stop - part.start
        for which, part in every
    )
    scratch = [params[0].new_empty(largest) for _ in range(2)]
    return [Piece(params, states, cut, scratch) for cut in every]


def cuts(tensors: list[Tensor], together: bool, apart: Collection[int] = ()) -> Iterator[Cut]:
    """How a list is divided into pieces. A new piece begins at each index of ``apart``.

    Tensors of half precision do not share a piece: ATen rounds the last few elements of a tensor,
    which do not fill a vector, by other instructions.
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
