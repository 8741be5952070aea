"""What forward hooks see: the sums of each module's output, the order of the calls, and the silent
units."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.selection import functorch_active
from ..dtensor import local
from .sums import sums_of

#: the dimension of the output in which the units are
LAYERS = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
#: how deep containers in an output are searched: one may contain itself
DEPTH = 8
#: row of a layer, and of the module, it or one after it, that put its units out
Stage = tuple[int, int]


class Outputs:
    """What the hooks of a window saw.

    A dead unit gets no gradient, but not every unit without a gradient is dead: the loss may use
    few samples (a hinge), or the weights after the unit may be zero (LoRA at its start). The output
    tells them apart. A layer's units are followed through the modules that do not change their
    shape (normalisation, activation, dropout). A unit is silent if after one of these its value is
    the same for all samples of the window, or zero. It is also silent if it is never positive and
    no hook sees what happens to it next: the activation may be a function, possibly ReLU. An output
    that goes straight into the next layer, or out of the model, has no activation.

    Args:
        fused: rows of the layers that include their activation.

    Attributes:
        sums: row and sums of each output of this step.
        called: rows in the order of this step's forward.
        ranges: the smallest and the largest value of each unit, in this window.
        passed: the stages whose output was seen to be passed on.
    """

    def __init__(self, fused: set[int]) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []
        self.called: list[int] = []
        self.ranges: dict[Stage, tuple[Tensor, Tensor]] = {}
        self.passed: set[Stage] = set()
        self._fused = fused
        self._last: Stage | None = None
        #: id -> tensor, its version, stage, dim of the units
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Stage, int]] = {}

    def add(self, row: int, module: nn.Module, given: Any, x: Tensor) -> None:
        # a checkpoint calls modules again in backward, in its order
        forward = torch._C._current_graph_task_id() == -1
        if forward:
            self.called.append(row)
        value, by_unit = local(x.detach()), None
        if (
            (found := self._stage(row, module, given, x))
            and value.layout is torch.strided
            and value.numel()
        ):
            stage, dim = found
            rest = [d for d in range(value.dim() + 1) if d != value.dim() + 1 + dim]
            least, most = value.unsqueeze(0).amin(rest), value.unsqueeze(0).amax(rest)
            by_unit = torch.maximum(-least, most)
            if before := self.ranges.get(stage):
                least, most = torch.minimum(before[0], least), torch.maximum(before[1], most)
            self.ranges[stage] = least, most
            self._known[id(x)] = weakref.ref(x), x._version, stage, dim
            self._last = stage if forward else self._last
        self.sums.append((row, sums_of(value, by_unit)))

    def _stage(
        self, row: int, module: nn.Module, given: Any, x: Tensor
    ) -> tuple[Stage, int] | None:
        dim = next((dim for kind, dim in LAYERS.items() if isinstance(module, kind)), None)
        if dim is not None:
            self.pass_on(given)
            units = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            return ((row, row), dim) if x.dim() >= -dim and x.shape[dim] == units else None
        if (
            isinstance(given, Tensor)
            and given.shape == x.shape
            and (before := self.pass_on(given, in_place=given is x))
        ):
            return (before[0][0], row), before[1]
        return None

    def pass_on(self, x: Any, in_place: bool = False) -> tuple[Stage, int] | None:
        """The stage whose output is ``x``, if nothing has changed it since."""
        if not isinstance(x, Tensor) or id(x) not in self._known:
            return None
        tensor, version, stage, dim = self._known[id(x)]
        if tensor() is None or not (in_place or x._version == version):
            return None
        self.passed.add(stage)
        return stage, dim

    def end_step(self) -> None:
        if self._last is not None:
            self.passed.add(self._last)  # the loss takes the last layer's output
        self.sums, self.called, self._last, self._known = [], [], None, {}

    def silent(self) -> Iterator[tuple[int, Tensor]]:
        """The row of each layer, and which of its units are silent."""
        found: dict[int, Tensor] = {}
        for stage, (least, most) in self.ranges.items():
            after_activation = stage[0] != stage[1] or stage[0] in self._fused
            here = (least == most) & (after_activation | (most == 0))
            if stage not in self.passed:
                here |= most <= 0
            found[stage[0]] = found[stage[0]] | here if stage[0] in found else here
        yield from found.items()

    def end_window(self) -> None:
        self.ranges, self.passed = {}, set()


class Look:
    """A forward hook that adds up a module's output, in training only: not in a validation pass
    without gradients, and not in a trace.

    The hook of the whole model, which has no row, only sees what the model returns. A copy of the
    module, or one loaded from a file, is not watched.
    """

    def __init__(self, row: int | None, outputs: Outputs) -> None:
        self._row, self._outputs = row, outputs

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or functorch_active()
            or torch.jit.is_tracing()
        ):
            return
        found = (x for x in tensors_of(output) if _measurable(x))
        with torch.no_grad():
            if self._row is None:
                for x in found:
                    self._outputs.pass_on(x)
            elif (first := next(found, None)) is not None:
                self._outputs.add(self._row, module, args[0] if args else None, first)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unwatched, ()


class _Unwatched:
    """The copy of a :class:`Look`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


def tensors_of(output: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors in mappings, lists, tuples and dataclasses, in order."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    elif is_dataclass(output):
        parts = (getattr(output, f.name, None) for f in fields(output))
    for part in parts if depth else ():
        yield from tensors_of(part, depth - 1)


def _measurable(x: Tensor) -> bool:
    """Whether torch can sum it: not nested tensors, compressed sparse ones, and float8."""
    if (
        not x.is_floating_point()
        or x.is_nested
        or x.layout not in (torch.strided, torch.sparse_coo)
    ):
        return False
    return x.dtype.itemsize > 1 and not x.is_inference() and not isinstance(x, FakeTensor)
