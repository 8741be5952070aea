"""What is read in machine code: branches, loops, bytes, loads in flight."""

from __future__ import annotations

import struct

import pytest
from helpers import python

from custom_backprop.testing.sass import Function, Pass

pytest.importorskip("triton")


def word(opcode, *, guard=7, distance=0, size=4, barrier=7, awaits=(), condition=7):
    """A machine instruction, written the other way round."""
    upper = (distance * 4 >> 8) & (1 << 48) - 1
    number = opcode | guard << 12 | (distance * 4 & 0xFF) << 16 | upper << 34
    if opcode != BRA:
        number |= size << 73
    number |= condition << 87 | barrier << 110 | sum(1 << 116 + b for b in awaits)
    return struct.pack("<QQ", number & (1 << 64) - 1, number >> 64)


FMUL, NOP, BRA, EXIT, LDG, STG = 0x220, 0x918, 0x947, 0x94D, 0x981, 0x986
multiply, end = word(FMUL), word(EXIT)


def load(barrier=0, size=6):
    return word(LDG, size=size, barrier=barrier)


def store(size=6):
    return word(STG, size=size)


def passes(*code):
    return Function(b"".join(code)).passes()


def test_a_kernel_without_a_loop():
    """Its end, a branch to itself and what fills it up do not count."""
    code = [load(), word(FMUL, awaits=[0]), store(), end, word(BRA, distance=-1), word(NOP)]
    assert passes(*code) == [Pass(4, 16, 16, 16)]
    assert Function(b"".join(code)).instructions == 5
    assert Pass(4, 16, 16, 16).per_number(2) == 4 / 16


def test_a_loop_counts_and_what_is_around_it_does_not():
    loop = [load(), word(FMUL, awaits=[0]), multiply, word(BRA, guard=0, distance=-4)]
    assert passes(multiply, *loop, multiply, store(), end) == [Pass(4, 16, 0, 16, True)]


def test_two_loops_in_a_loop_and_one_that_only_waits():
    spin = [word(FMUL, awaits=[0]), word(BRA, guard=1, distance=-2)]
    first = [load(size=4), *spin, word(BRA, guard=0, distance=-4)]
    second = [store(size=5), word(BRA, guard=0, distance=-2)]
    code = [multiply, *first, *second, multiply]
    outer = [*code, word(BRA, guard=0, distance=-len(code) - 1)]
    assert passes(*outer, end) == [Pass(4, 4, 0, 4, True), Pass(2, 0, 8, 0, True)]


def test_what_few_do_costs_the_others_nothing():
    """Behind a branch, in the loop or after the end."""
    skip = [word(BRA, guard=2, distance=3, awaits=[0]), multiply, multiply, multiply]
    out = word(BRA, guard=3, distance=2)
    loop = [load(), *skip, out, word(BRA, guard=0, distance=-7)]
    cold = [multiply, multiply, word(BRA, distance=-5)]
    assert passes(*loop, end, *cold) == [Pass(4, 16, 0, 16, True)]
    assert passes(word(BRA, guard=2, distance=2), load(), multiply, store(), end) == [
        Pass(5, 16, 16, 16)
    ], "a path that moves less is not the pass"
    assert passes(word(EXIT, guard=0), store(), end) == [Pass(3, 0, 16, 0)]


@pytest.mark.parametrize(("code", "most"), [
    ([load(0), load(1), word(FMUL, awaits=[0]), word(FMUL, awaits=[1])], 32),
    ([load(0), word(FMUL, awaits=[0]), load(1), word(FMUL, awaits=[1])], 16),
    ([load(0), load(0), word(FMUL, awaits=[0])], 32),
    ([word(FMUL, awaits=[0]), multiply, load(0)], 16),
    ([load(0), word(FMUL, awaits=[0, 1]), load(1)], 32),
    ([multiply, load(0), word(FMUL, awaits=[1]), load(1), word(FMUL, awaits=[0])], 32),
])  # fmt: skip
def test_loads_in_flight(code, most):
    """Until an instruction waits for them; in a loop also in the next round."""
    back = word(BRA, guard=0, distance=-len(code) - 1)
    assert [p.in_flight for p in passes(*code, back, end)] == [most]


@pytest.mark.parametrize("distance", [1, 70, 5000, -1, -70, -5000])
def test_branches_far_and_near(distance):
    (branch,) = Function(word(BRA, distance=distance)).code
    assert branch.distance == distance
    assert branch.always
    assert not Function(word(BRA, guard=15, distance=distance)).code[0].always
    assert not Function(word(BRA, condition=0, distance=distance)).code[0].always


@pytest.mark.parametrize(("size", "count"), [*enumerate((1, 1, 2, 2, 4, 8, 16))])
def test_bytes(size, count):
    loading, storing = Function(load(size=size) + store(size)).code
    assert (loading.loaded, loading.stored) == (count, 0)
    assert (storing.loaded, storing.stored) == (0, count)


KERNEL = """
import torch, triton, triton.language as tl
from custom_backprop.testing import compile_offline

@triton.jit
def sums(X, Y, n, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(X + start + i).to(tl.float32)
        for _ in tl.static_range(TIMES):
            x = tl.where(x > 0, x, 1 + x)
        total += x
    tl.store(Y + i, total)

x = torch.empty(1 << 16, device="meta", dtype=torch.bfloat16)
few, many = (
    compile_offline(sums, x, x, 1 << 16, TIMES=times, BLOCK=1024, num_warps=4).passes
    for times in (1, 5)
)
print([(p.loaded, p.stored, p.in_flight) for p in few + many])
print(many[0].instructions - few[0].instructions)
"""


def test_a_compiled_loop(tmp_path):
    """8 numbers of 16 bits a thread and round. A comparison and a sum a number, four times."""
    (tmp_path / "kernel_on_disk.py").write_text(KERNEL)  # the compiler reads the source file
    printed = python(f"import runpy; runpy.run_path({str(tmp_path / 'kernel_on_disk.py')!r})")
    moved, more = printed.splitlines()
    assert moved == "[(16, 0, 16), (16, 0, 16)]"
    assert int(more) == 8 * 4 * 2
