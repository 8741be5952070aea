"""The memory that a Triton kernel accesses, seen in the interpreter: a GPU's memory checker without
a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import use_backend
from .accesses import Access, line_of_kernel, tensors_in, watched
from .interpreter.kernels import tuned
from .regimes import both_ways
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
        notes: what it did that need not be wrong (see :func:`audit`).
    """

    kernel: str
    programs: int
    moved: int
    floor: int
    reread: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            lines += [f"  note: {note}" for note in launch.notes]
        lines += [f"FAULT {difference}" for difference in self.differences]
        return "\n".join(lines)


@contextmanager
def audit(*tensors: Tensor, lenient: bool = False) -> Iterator[Audit]:
    """Watches every launch of any Triton kernel inside, in Triton's interpreter.

    A launch has a fault if it

    - accesses an address that is not an element of one of its tensor arguments (or of ``tensors``);
    - has two programs that store to the same address, or one that reads what another one writes, or
      one that plainly accesses what another one updates by an atomic operation: on a GPU their
      order is unknown;
    - updates a tensor in place while ``@triton.autotune`` has a choice among configurations, and
      neither ``restore_value`` nor ``reset_to_zero`` names it: on a GPU, tuning runs the kernel
      many times;
    - stores to some elements of a tensor but not to all (unless it also reads that tensor, as an
      update in place does), or to one of them twice;
    - uses an atomic operation: the order of a sum, and so its bits, would differ from run to run.

    Args:
        tensors: tensors that kernels access but do not get as arguments, for example through a
            table of pointers.
        lenient: what a kernel may have reasons for is a note, not a fault: the last two, programs
            that store the same bits to an address, and, where atomic operations compare, swap or
            count, whatever the order of the programs decides: they may wait for one another.

    Yields:
        the :class:`Audit`, to which each launch is added: the bytes that it moved, and the least
        possible, if every address were accessed once.

    Raises:
        RuntimeError: the interpreter is off (set ``TRITON_INTERPRET=1`` before triton is imported,
            or enter :func:`interpreted`).

    Example::

        with interpreted(), audit() as seen:
            my_kernel[(4,)](x, y, n, BLOCK=256)
        print(seen)
        seen.raise_if_faulty()
    """
    seen = Audit()

    def memory(given: dict[str, Tensor]) -> _Memory:
        return _Memory({**given, **tensors_in({"tensors": tensors})})

    def done(kernel: str, accessed: _Memory) -> None:
        seen.launches.append(accessed.report(kernel, lenient))

    with watched(memory, done):
        yield seen


class _Storage:
    """The bytes of one storage: which of them belong to an argument's elements, and which programs
    accessed them."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.bytes = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start))
        self.element = np.zeros(size, bool)
        self.reads, self.writes = np.zeros((2, size), np.int64)
        self.reader, self.writer, self.updater = np.full((3, size), _NOBODY)
        #: read before anybody wrote; written by several programs, and not the same
        self.old, self.contested = np.zeros((2, size), bool)

    def accessed(self, access: Access, offsets: np.ndarray, here: np.ndarray, program: int) -> None:
        if access.kind == "load":
            self.old[offsets] |= self.writer[offsets] == _NOBODY
        elif access.kind == "store" and access.values is not None:
            others = (self.writer[offsets] != _NOBODY) & (self.writer[offsets] != program)
            other = (self.bytes[offsets] != access.values[here]).any(1, keepdims=True)
            self.contested[offsets] |= others & other
        if access.kind == "atomic":
            who = self.updater
        else:
            count = self.reads if access.kind == "load" else self.writes
            who = self.reader if access.kind == "load" else self.writer
            np.add.at(count, offsets, 1)
        alone = (who[offsets] == _NOBODY) | (who[offsets] == program)
        who[offsets] = np.where(alone, program, _SEVERAL)


class _Memory:
    """Every tensor of one launch, by address."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.storages: dict[int, _Storage] = {}
        self.views: dict[str, tuple[_Storage, np.ndarray, int]] = {}
        self.programs: dict[Any, int] = {}
        self.atomics = self.moved = 0
        self.locks = False
        self.protected = tuned[-1]
        self.outside: dict[str, int] = {}
        self.first_outside: dict[str, str] = {}
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

    def access(self, access: Access) -> np.ndarray:
        """Records an access. Returns which addresses are in an element of some tensor."""
        addresses, size = access.addresses, access.size
        program = self.programs.setdefault(access.program, len(self.programs))
        self.atomics += access.kind == "atomic"
        self.locks |= access.locks
        self.moved += addresses.size * size if access.kind != "atomic" else 0
        allowed = np.zeros(addresses.shape, bool)
        for s in self.storages.values():
            here = (addresses >= s.start) & (addresses + size <= s.start + s.element.size)
            offsets = addresses[here, None] - s.start + np.arange(size)
            allowed[here] = s.element[offsets].all(1)
            s.accessed(access, offsets, here, program)
        if not allowed.all():
            self.outside[access.kind] = self.outside.get(access.kind, 0) + int((~allowed).sum())
            if access.kind not in self.first_outside:
                self.first_outside[access.kind] = self._describe(addresses[~allowed][0])
        return allowed

    def _describe(self, address: int) -> str:
        """Where the address is, and which line of the kernel went there."""
        line = line_of_kernel()
        names = {id(s): name for name, (s, _, _) in reversed(self.views.items())}
        nearest = min(
            self.storages.values(),
            key=lambda s: max(s.start - address, address - s.start - s.element.size),
            default=None,
        )
        if nearest is None:
            return line
        name, past = names[id(nearest)], address - nearest.start - nearest.element.size
        if past >= 0:
            return f"{line}, {past} bytes past the end of {name}"
        if address < nearest.start:
            return f"{line}, {nearest.start - address} bytes before {name}"
        return f"{line}, between the elements of {name}"

    def report(self, kernel: str, lenient: bool) -> AuditedLaunch:
        faults = [
            f"{self.outside[kind]} {kind}s outside every tensor, the first at "
            f"{self.first_outside[kind]}"
            for kind in ("load", "store", "atomic")
            if kind in self.outside
        ]
        notes = [f"{self.atomics} atomic operations"] if self.atomics else []
        reread, judged = {}, set()
        for name, (s, own, size) in self.views.items():
            reads, writes, updated = s.reads[own], s.writes[own], s.updater[own] != _NOBODY
            if reads.sum() > np.count_nonzero(reads) > 0:
                reread[name] = float(reads.sum() / np.count_nonzero(reads))
            if (
                not (writes.any() or updated.any()) or (s.start, own.tobytes()) in judged
            ):  # not an output, or one that has another name, too
                continue
            judged.add((s.start, own.tobytes()))
            several = s.writer[own] == _SEVERAL
            reader, updater = s.reader[own], s.updater[own]
            tuning = self.protected is not None and name not in self.protected
            unordered = {
                "written by several programs": several & s.contested[own],
                "read by one program and written by another": (writes > 0)
                & (reads > 0)
                & (reader != s.writer[own]),
                "updated by an atomic operation and accessed by another program": updated
                & (
                    ((reads > 0) & (reader != updater))
                    | ((writes > 0) & (s.writer[own] != updater))
                ),
            }
            wrong = {
                "updated in place, while @triton.autotune runs the kernel for every configuration "
                "(name it in restore_value or reset_to_zero)": tuning
                & ((s.old[own] & (writes > 0)) | updated),
            }
            allowed = {
                "never written": (writes == 0) & (not reads.any()) & (not updated.any()),
                "written more than once": writes > 1,
                "written by several programs, with the same bits": several & ~s.contested[own],
            }
            (allowed if self.locks else wrong).update(unordered)
            for found, kept in ((faults, wrong), (notes, allowed)):
                found += [
                    f"{name}: {bad.sum() // size} of {own.size // size} elements {what}"
                    for what, bad in kept.items()
                    if np.any(bad)
                ]
        touched = sum(
            np.count_nonzero(count) for s in self.storages.values() for count in (s.reads, s.writes)
        )
        if not lenient:
            faults, notes = faults + notes, []
        return AuditedLaunch(
            kernel, len(self.programs), self.moved, int(touched), reread, faults, notes
        )


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
