"""Reads the machine code of NVIDIA's GPUs, sm_70 and later: how many instructions a kernel takes
for each number that it moves.

An instruction has 16 bytes. The lowest 12 bits are its opcode, the next 4 its guard. Of the others,
branches and accesses to global memory are decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

NOP, BRA, EXIT, RET = 0x918, 0x947, 0x94D, 0x950
LOADS = {0x381, 0x981, 0xFAE}  # LDG; LDGSTS, to shared memory
STORES = {0x386, 0x986}  # STG

#: in the place of a predicate: true
_TRUE = 7


@dataclass(frozen=True)
class Instruction:
    """A machine instruction: its lower and its upper half."""

    low: int
    high: int

    @property
    def opcode(self) -> int:
        return self.low & 0xFFF

    @property
    def always(self) -> bool:
        """Whether every thread that comes here takes this branch, or ends: it has neither a guard
        nor a condition."""
        return self.low >> 12 & 15 == _TRUE and self.high >> 23 & 15 == _TRUE

    @property
    def distance(self) -> int:
        """Instructions from the next one to the target of this branch."""
        upper = (self.high << 64 | self.low) >> 34 & (1 << 48) - 1
        upper -= upper >> 47 << 48
        return (upper << 8 | self.low >> 16 & 0xFF) // 4

    @property
    def loaded(self) -> int:
        """Bytes from global memory to a thread."""
        return self._bytes if self.opcode in LOADS else 0

    @property
    def stored(self) -> int:
        """Bytes from a thread to global memory."""
        return self._bytes if self.opcode in STORES else 0

    @property
    def _bytes(self) -> int:
        return (1, 1, 2, 2, 4, 8, 16, 16)[self.high >> 9 & 7]

    @property
    def barrier(self) -> int:
        """Which of the six barriers its result is awaited at; 7 for none."""
        return self.high >> 46 & 7

    @property
    def awaited(self) -> set[int]:
        """The barriers that it waits for."""
        return {b for b in range(6) if self.high >> 52 + b & 1}


@dataclass(frozen=True)
class Pass:
    """What a thread does in one round of an innermost loop over global memory; of a kernel without
    such a loop, all that it does.

    Of several paths this is the shortest among those that move the most: what an ``if`` does for a
    few threads costs the others nothing.

    Attributes:
        instructions: machine instructions.
        loaded, stored: bytes from and to global memory.
        in_flight: most bytes of the loads that nothing has waited for yet. Those to shared memory
            are taken to be under way for two rounds of a loop.
        loop: whether it is a round of a loop.
    """

    instructions: int
    loaded: int
    stored: int
    in_flight: int
    loop: bool = False

    def per_number(self, size: int) -> float:
        """Instructions for each number of ``size`` bytes that is loaded or stored."""
        return size * self.instructions / max(1, self.loaded + self.stored)


class Function:
    """The machine code of one function."""

    def __init__(self, code: bytes) -> None:
        self.code = [Instruction(*halves) for halves in struct.iter_unpack("<QQ", code)]

    @property
    def instructions(self) -> int:
        """All but the NOPs that fill it up."""
        return sum(i.opcode != NOP for i in self.code)

    def passes(self) -> list[Pass]:
        """The innermost loops that access global memory, in order; without one, the whole."""
        every = {
            head: body
            for head, body in self._loops.items()
            if any(i.loaded or i.stored for b in body for i in self._block(b))
        }
        inner = {h: b for h, b in every.items() if not any(o in b for o in every if o != h)}
        if not inner:
            whole = set(self._dominators)
            path = self._shortest(0, whole, lambda b: self._block(b)[-1].opcode == EXIT)
            return [_pass(path)]

        def round_of(head: int, body: set[int]) -> Pass:
            return _pass(self._shortest(head, body, lambda b: head in self._after[b]), True)

        return [round_of(head, body) for head, body in sorted(inner.items())]

    @cached_property
    def _ends(self) -> dict[int, int]:
        """Start -> end of each basic block, in order."""
        starts = {0}
        for at, i in enumerate(self.code, 1):
            if i.opcode in (BRA, EXIT, RET):
                starts.add(at)
            if i.opcode == BRA:
                starts.add(at + i.distance)
        bounds = [*sorted(s for s in starts if s < len(self.code)), len(self.code)]
        return dict(pairwise(bounds))

    def _block(self, start: int) -> list[Instruction]:
        return self.code[start : self._ends[start]]

    @cached_property
    def _after(self) -> dict[int, list[int]]:
        """Block -> the blocks that may follow it."""
        found = {}
        for block, end in self._ends.items():
            last = self.code[end - 1]
            goes_on = last.opcode not in (BRA, EXIT, RET) or not last.always
            found[block] = [end] if goes_on and end < len(self.code) else []
            if last.opcode == BRA:
                found[block].append(end + last.distance)
        return found

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Block -> the blocks on every path to it; of blocks that can be reached."""
        before: dict[int, list[int]] = {0: []}
        waiting = [0]
        while waiting:
            block = waiting.pop()
            for after in self._after[block]:
                if after not in before:
                    before[after] = []
                    waiting.append(after)
                before[after].append(block)
        found = {block: {0} if block == 0 else set(before) for block in sorted(before)}
        changed = True
        while changed:
            changed = False
            for block in found:
                if block:
                    new = set.intersection(*(found[b] for b in before[block])) | {block}
                    changed |= new != found[block]
                    found[block] = new
        return found

    @cached_property
    def _loops(self) -> dict[int, set[int]]:
        """Head -> the blocks of each loop, with those of loops inside it."""
        found: dict[int, set[int]] = {}
        for tail, dominators in self._dominators.items():
            for head in dominators.intersection(self._after[tail]):
                body, waiting = found.setdefault(head, {head}), [tail]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += [b for b in self._dominators if block in self._after[b]]
        return found

    def _shortest(
        self, first: int, body: set[int], may_end: Callable[[int], bool]
    ) -> list[Instruction]:
        """The shortest path of those that move the most, from ``first`` to a block that may end it.
        Loops on it go round once."""
        found: dict[int, list[Instruction] | None] = {}

        def path(block: int) -> list[Instruction] | None:
            if block not in found:
                ahead = (set(self._after[block]) & body) - self._dominators[block]
                rest = [p for b in sorted(ahead) if (p := path(b)) is not None]
                rest += [[]] if may_end(block) else []
                shortest = min(rest, key=_length, default=None)
                found[block] = None if shortest is None else self._block(block) + shortest
            return found[block]

        return path(first) or []


def _length(path: list[Instruction]) -> tuple[int, int]:
    return -sum(i.loaded + i.stored for i in path), len(path)


def _pass(path: list[Instruction], loop: bool = False) -> Pass:
    waiting = dict.fromkeys(range(8), 0)
    most = 0
    for i in path * (2 if loop else 1):
        waiting |= dict.fromkeys(i.awaited, 0)
        waiting[i.barrier] += i.loaded
        most = max(most, sum(waiting.values()))
    return Pass(
        instructions=sum(i.opcode != NOP for i in path),
        loaded=sum(i.loaded for i in path),
        stored=sum(i.stored for i in path),
        in_flight=most,
        loop=loop,
    )


def functions(cubin: bytes) -> list[Function]:
    """Those of an ELF file: its sections ``.text``."""
    headers, size, number, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<II16xQQ", cubin, headers + i * size) for i in range(number)]
    at = sections[names][2]
    return [
        Function(cubin[start : start + length])
        for name, _, start, length in sections
        if cubin[at + name :].startswith(b".text")
    ]
