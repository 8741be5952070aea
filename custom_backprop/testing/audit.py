"""The memory that a Triton kernel accesses, seen in the interpreter: a GPU's memory checker without
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import use_backend
from .accesses import tensors_in, watched
from .offline import both_ways
from .spec import Make, OpSpec, Sample

_NOBODY, _SEVERAL = -1, -2


@dataclass
class AuditedLaunch:
    """What one launch did.

    Attributes:
        moved: bytes of all its loads and stores.
        floor: bytes if every distinct address had been loaded and stored once.
        reread: argument -> how often its bytes were loaded on average, if more than once (on a GPU
            the caches serve these).
        faults: what it did wrong; empty if nothing.
    """

    kernel: str
    programs: int
    moved: int
    floor: int
    reread: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Audit:
    """The launches seen by :func:`audit`. Prints as a table."""

    launches: list[AuditedLaunch] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    """results that differ from the formula's, although every access was right"""

    @property
    def faults(self) -> list[str]:
        found = [f"{launch.kernel}: {fault}" for launch in self.launches for fault in launch.faults]
        return found + self.differences

    def raise_if_faulty(self) -> Audit:
        """Raises AssertionError if any launch has a fault; else returns the audit."""
        if self.faults:
            raise AssertionError("\n".join(self.faults))
        return self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for launch in self.launches:
            reread = ", ".join(f"{name} x{times:.1f}" for name, times in launch.reread.items())
            ratio = launch.moved / launch.floor if launch.floor else 1.0
            lines.append(
                f"{launch.kernel}: {launch.programs} programs, moved {launch.moved} bytes, "
                f"{ratio:.3f} of the floor  {reread}"
            )
            lines += [f"  FAULT {fault}" for fault in launch.faults]
        lines += [f"FAULT {difference}" for difference in self.differences]
        return "\n".join(lines)


@contextmanager
def audit(*tensors: Tensor) -> Iterator[Audit]:
    """Watches every launch of any Triton kernel inside, in Triton's interpreter.

    A launch has a fault if it

    - accesses an address that is not an element of one of its tensor arguments (or of ``tensors``);
    - stores to some elements of a tensor but not to all (unless it also reads that tensor, as an
      update in place does), or to one of them twice;
    - has two programs that store to the same address, or one that reads what another one writes: on
      a GPU their order is unknown;
    - uses an atomic operation: the order of a sum, and so its bits, would differ from run to run.

    Args:
        tensors: tensors that kernels access but do not get as arguments, for example through a
            table of pointers.

    Yields:
        the :class:`Audit`, to which each launch is added: the bytes that it moved, and the least
        possible, if every address were accessed once.

    Raises:
        RuntimeError: the interpreter is off (set ``TRITON_INTERPRET=1`` before triton is imported).

    Example::

        with audit() as seen:
            my_kernel[(4,)](x, y, n, BLOCK=256)
        print(seen)
        seen.raise_if_faulty()
    """
    seen = Audit()

    def memory(given: dict[str, Tensor]) -> _Memory:
        return _Memory({**given, **tensors_in({"tensors": tensors})})

    def done(kernel: str, accessed: _Memory) -> None:
        seen.launches.append(accessed.report(kernel))

    with watched(memory, done):
        yield seen


class _Storage:
    """The bytes of one storage: which of them belong to an argument's elements, and which programs
    accessed them."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.element = np.zeros(size, bool)
        self.reads, self.writes = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.reader, self.writer = np.full(size, _NOBODY), np.full(size, _NOBODY)


class _Memory:
    """Every tensor of one launch, by address."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.storages: dict[int, _Storage] = {}
        self.views: dict[str, tuple[_Storage, np.ndarray, int]] = {}
        self.programs: dict[Any, int] = {}
        self.atomics = self.moved = 0
        self.outside = {False: 0, True: 0}
        for name, t in tensors.items():
            whole = t.untyped_storage()
            if whole.nbytes():
                storage = self.storages.setdefault(
                    whole.data_ptr(), _Storage(whole.data_ptr(), whole.nbytes())
                )
                positions = torch.arange(whole.nbytes() // t.element_size()).as_strided(
                    t.size(), t.stride(), t.storage_offset()
                )
                own = (
                    positions.unique().numpy()[:, None] * t.element_size()
                    + np.arange(t.element_size())
                ).ravel()
                storage.element[own] = True
                self.views[name] = storage, own, t.element_size()

    def access(self, addresses: np.ndarray, size: int, grid_index: Any, stores: bool) -> np.ndarray:
        """Records an access to ``size`` bytes at each address. Returns which of them are in an
        element of some tensor."""
        program = self.programs.setdefault(grid_index, len(self.programs))
        self.moved += addresses.size * size
        allowed = np.zeros(addresses.shape, bool)
        for s in self.storages.values():
            here = (addresses >= s.start) & (addresses + size <= s.start + s.element.size)
            offsets = addresses[here, None] - s.start + np.arange(size)
            allowed[here] = s.element[offsets].all(1)
            count, who = (s.writes, s.writer) if stores else (s.reads, s.reader)
            np.add.at(count, offsets, 1)
            who[offsets] = np.where(
                (who[offsets] == _NOBODY) | (who[offsets] == program), program, _SEVERAL
            )
        self.outside[stores] += int((~allowed).sum())
        return allowed

    def report(self, kernel: str) -> AuditedLaunch:
        faults = [
            f"{n} {'stores' if store else 'loads'} outside every tensor"
            for store, n in self.outside.items()
            if n
        ]
        if self.atomics:
            faults.append(f"{self.atomics} atomic operations")
        reread, judged = {}, set()
        for name, (s, own, size) in self.views.items():
            reads, writes = s.reads[own], s.writes[own]
            if reads.sum() > np.count_nonzero(reads) > 0:
                reread[name] = float(reads.sum() / np.count_nonzero(reads))
            if (
                not writes.any() or (s.start, own.tobytes()) in judged
            ):  # not an output, or one that has another name, too
                continue
            judged.add((s.start, own.tobytes()))
            wrong = {
                "never written": (writes == 0) & (not reads.any()),
                "written more than once": writes > 1,
                "written by several programs": s.writer[own] == _SEVERAL,
                "read by one program and written by another": (writes > 0)
                & (reads > 0)
                & (s.reader[own] != s.writer[own]),
            }
            faults += [
                f"{name}: {bad.sum() // size} of {own.size // size} elements {what}"
                for what, bad in wrong.items()
                if bad.any()
            ]
        touched = sum(
            np.count_nonzero(count) for s in self.storages.values() for count in (s.reads, s.writes)
        )
        return AuditedLaunch(kernel, len(self.programs), self.moved, int(touched), reread, faults)


def audit_op(spec: OpSpec) -> Audit:
    """Audits every launch of an op in float32: on its samples, and on large inputs, where several
    programs divide the work, evenly and not.

    A row that is counted twice is not an illegal access. It shows in the result, which is compared
    with the formula's.
    """
    make = Make("cpu", torch.float32)
    larger = [spec.large(make, "medium"), replace(spec.large(make, "awkward"), name="awkward")]
    with np.errstate(all="ignore"), audit() as seen:
        for sample in (*spec.samples(make), *larger):
            found = [_results(spec, sample, backend) for backend in ("triton", "formula")]
            for (what, ours), (_, true) in zip(*found, strict=True):
                off = (ours - true).abs().max().item() if true.numel() else 0.0
                if off > 1e-3 * (true.abs().max().item() if true.numel() else 1.0):
                    seen.differences.append(
                        f"{spec.name} ({sample.name}): {what} is off the formula's by {off:.2g}"
                    )
    return seen


def _results(spec: OpSpec, sample: Sample, backend: str) -> list[tuple[str, Tensor]]:
    """(description, tensor) of each output and gradient."""

    def fresh(a: Any) -> Any:
        return a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a

    args = tuple(map(fresh, sample.args))
    kwargs = {k: fresh(a) for k, a in sample.kwargs.items()}
    with use_backend(backend):
        found = both_ways(spec, replace(sample, args=args, kwargs=kwargs))
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.grad is not None]
    return [
        *((f"output {i}", y.detach()) for i, y in enumerate(found)),
        *((f"a gradient of shape {tuple(a.shape)}", a.grad) for a in given if a.grad is not None),
    ]
