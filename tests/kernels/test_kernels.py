"""What a kernel takes when compiled, and what it touches when it runs: planted faults are seen."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from itertools import chain

import pytest
import torch
from helpers import python

from custom_backprop.backends import interpreting, selection
from custom_backprop.testing import (
    Resources,
    assembly,
    audit,
    compile_offline,
    database,
    goals,
    regimes,
)
from custom_backprop.testing.optimizers import OPTIMIZERS, steps
from custom_backprop.testing.sass import Pass

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(not interpreting(), reason="these kernels run in the interpreter")


@triton.jit
def _copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, i < n), i < n)


@triton.jit
def _everybody_stores(X, Y):
    tl.store(Y, tl.load(X))


@triton.jit
def _stores_twice(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, x)
    tl.store(Y + i, x)


@triton.jit
def _shift(X, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(X + program + 1, tl.load(X + program))


@triton.jit
def _add_atomically(X, Y, BLOCK: tl.constexpr):
    tl.atomic_add(Y + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, BLOCK)))


def seen(kernel, programs, *args, **constexprs):
    with audit() as found:
        kernel[(programs,)](*args, **constexprs)
    (launch,) = found.launches
    return launch


def test_a_clean_launch():
    x, y = torch.randn(10), torch.empty(10)
    launch = seen(_copy, 3, x, y, 10, BLOCK=4)
    assert (launch.kernel, launch.programs, launch.faults) == ("test_kernels._copy", 3, [])
    assert (launch.moved, launch.floor, launch.reread) == (80, 80, {})
    torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_what_is_read_again_is_counted():
    launch = seen(_everybody_stores, 4, torch.ones(1), torch.empty(1))
    assert (launch.moved, launch.floor, launch.reread) == (32, 8, {"X": 4.0})


def test_an_update_in_place_may_leave_elements_alone():
    x = torch.randn(10)
    assert seen(_copy, 2, x, x, 7, BLOCK=4).faults == []


def test_out_of_bounds():
    buffer = torch.zeros(12)
    launch = seen(_copy, 1, torch.ones(3), buffer[:3], 5, BLOCK=8)
    loads, stores = launch.faults
    assert loads.startswith("2 loads outside every tensor, the first at test_kernels.py:")
    assert loads.endswith(", 0 bytes past the end of X")
    assert stores.startswith("2 stores outside every tensor, the first at test_kernels.py:")
    assert buffer.tolist() == [1.0] * 3 + [0.0] * 9, "what is out of bounds is not carried out"


def test_the_gaps_of_a_view_are_out_of_bounds():
    (fault,) = seen(_copy, 1, torch.ones(8)[::2], torch.empty(4), 4, BLOCK=4).faults
    assert fault.startswith("2 loads outside every tensor")
    assert fault.endswith("between the elements of X")


def test_tensors_reached_through_no_argument():
    other = torch.ones(8)
    with audit(other) as found:
        _copy[(1,)](other[:2], torch.empty(4), 4, BLOCK=4)
    assert found.faults == []


def test_an_element_that_is_never_written():
    assert seen(_copy, 1, torch.ones(5), torch.empty(5), 4, BLOCK=4).faults == [
        "Y: 1 of 5 elements never written"
    ]


def test_an_element_that_is_written_twice():
    assert seen(_stores_twice, 1, torch.ones(4), torch.empty(4), BLOCK=4).faults == [
        "Y: 4 of 4 elements written more than once"
    ]


def test_two_programs_at_one_address():
    assert (
        "Y: 1 of 1 elements written by several programs, with the same bits"
        in seen(_everybody_stores, 2, torch.ones(1), torch.empty(1)).faults
    )


def test_a_program_that_reads_what_another_writes():
    assert seen(_shift, 3, torch.randn(4), BLOCK=4).faults == [
        "X: 2 of 4 elements read by one program and written by another"
    ]


def test_atomics_in_the_interpreter():
    with audit() as found:
        _add_atomically[(1,)](torch.ones(4), torch.zeros(4), BLOCK=4)
    assert found.faults == ["test_kernels._add_atomically: 1 atomic operations"]
    with pytest.raises(AssertionError, match="1 atomic operations"):
        found.raise_if_faulty()
    assert "FAULT 1 atomic operations" in str(found)


def test_an_audit_leaves_no_trace():
    x = torch.ones(3)
    with audit() as found:
        pass
    _copy[(1,)](x, x, 3, BLOCK=4)
    assert found.launches == []


def test_an_audit_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), audit():
        pass


def test_compiling_needs_the_compiler():
    with pytest.raises(RuntimeError, match="decorated with TRITON_INTERPRET=1"):
        compile_offline(_copy, torch.ones(3), torch.ones(3), 3, target="sm_90", BLOCK=4)
    with pytest.raises(ValueError, match="choose among sm_80"):
        compile_offline(_copy, torch.ones(3), torch.ones(3), 3, target="sm_1", BLOCK=4)


PTX = """
  @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
  ld.global.L1::evict_first.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
  ld.volatile.global.b16 { %rs1 }, [ %rd1 + 0 ];
  ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
  cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
  cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, 0x4;
  st.global.v4.b32 [ %rd5 + 0 ], { %r1, %r2, %r3, %r4 };
  st.global.v2.b32 [ %rd5 + 0 ], { %r1, %r2 };
  redux.sync.add.s32 %r7, %r8, 0xffffffff;
"""

GCN = """
  global_load_dwordx4 v[0:3], v0, s[0:1]
  buffer_load_ushort v4, v5, s[4:7], 0 offen
  s_load_dwordx4 s[0:3], s[4:5], 0x0
  buffer_store_dwordx4 v[0:3], v5, s[4:7], 0 offen
  .private_segment_fixed_size: {scratch}
  .vgpr_count:     42
  .vgpr_spill_count: {spills}
"""


def test_reading_ptx():
    assert assembly.read_ptx(PTX) == {
        "loads": 5,
        "wide_loads": 3,
        "stores": 2,
        "wide_stores": 1,
        "atomics": 0,
    }
    assert (
        assembly.read_ptx(
            "atom.global.gpu.acq_rel.add.f32 %f1, [ %rd1 + 0 ], %f2;\nred.global.add.f32 [%rd1], "
            "%f1;"
        )["atomics"]
        == 2
    )


def test_reading_registers_and_the_stack():
    line = (
        " Function _copy:\n  REG:32 STACK:{} SHARED:0 LOCAL:{} CONSTANT[0]:380 TEXTURE:0 SURFACE:0 "
        "SAMPLER:0\n"
    )
    assert assembly.read_usage(line.format(0, 0)) == {"registers": 32, "spilled": 0}
    assert assembly.read_usage(line.format(8, 16)) == {"registers": 32, "spilled": 24}


@pytest.mark.parametrize(("scratch", "spills", "spilled"), [(0, 0, 0), (24, 5, 24), (0, 5, 20)])
def test_reading_amdgcn(scratch, spills, spilled):
    found = assembly.read_amdgcn({"amdgcn": GCN.format(scratch=scratch, spills=spills)})
    counts = {"loads": 2, "wide_loads": 1, "stores": 1, "wide_stores": 1, "atomics": 0}
    counts["instructions"] = 4
    assert found == {"registers": 42, "spilled": spilled, **counts}
    assert (
        assembly.read_amdgcn(
            {"amdgcn": GCN.format(scratch=0, spills=0) + "global_atomic_add_f32 v0, v1, s[0:1]"}
        )["atomics"]
        == 1
    )


def resources(**changed):
    counts = dict.fromkeys(
        (
            "registers",
            "spilled",
            "shared",
            "loads",
            "wide_loads",
            "stores",
            "wide_stores",
            "atomics",
        ),
        0,
    )
    return Resources("k", "sm_80", "*fp32", "", 4, **{**counts, **changed})


def test_faults_of_a_compiled_kernel():
    assert resources(registers=255, shared=163 * 1024).faults == []
    assert "local memory" in resources(spilled=8).faults[0]
    assert "atomic" in resources(atomics=1).faults[0]
    assert "shared memory" in resources(shared=163 * 1024 + 1).faults[0]


def test_a_kernel_short_of_its_goals(monkeypatch):
    """By figure: at the goal, and short of it; what is known to be short may be no worse."""
    monkeypatch.setattr(goals, "TRITON", "")  # any

    def faults(*passes, **taken):
        taken = {"registers": 32, "wide_loads": 1, **taken}
        found = resources(**taken, passes=(*(Pass(1, 0, 32, 0, p.loop) for p in passes), *passes))
        assert found.faults == [], "of others' kernels nothing is known"
        assert found.to_dict()["faults"] == found.shortfalls
        return found.shortfalls

    assert faults(per_element=22.0) == []
    assert faults(per_element=22.1) == ["22.1 instructions an element, where 22 is the most"]

    assert faults(Pass(88, 16, 0, 24)) == []
    assert faults(Pass(89, 16, 0, 24)) == ["11.1 instructions a number, where 11 is the most"]
    assert faults(Pass(88, 16, 0, 23)) == ["46.0 KB in flight, where 48 is the least"]
    assert faults(Pass(88, 16, 0, 23), registers=16) != [], "64 warps are the most"
    assert faults(Pass(80, 16, 0, 24, True)) == []
    assert faults(Pass(81, 16, 0, 24, True)) == [
        "10.1 instructions a number in a loop, where 10 is the most"
    ]
    assert faults(Pass(1, 16, 0, 999), registers=255, shared=113 * 1024) == []
    assert faults(Pass(1, 16, 0, 999), shared=114 * 1024) == [
        "1.0 programs on a multiprocessor, where 2 is the least"
    ]
    assert faults(Pass(8, 16, 0, 48), registers=168) == [
        "18.0 KB in flight, where 48 is the least"
    ], "three programs by 4 warps"
    monkeypatch.setattr(goals, "SHORT", {("k", goals.NUMBER): 12, ("k, narrow", goals.NUMBER): 13})
    assert [bool(faults(Pass(8 * n, 16, 0, 24))) for n in (12, 13)] == [False, True]
    assert [bool(faults(Pass(8 * n, 16, 0, 24), wide_loads=0)) for n in (13, 14)] == [False, True]
    monkeypatch.setattr(goals, "TRITON", "0.")
    assert faults(Pass(999, 16, 0, 24)) == []


COMPILED = """
import torch, triton, triton.language as tl
from custom_backprop.testing import compile_offline

@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, i < n), i < n)

@triton.jit
def add(X, Y, BLOCK: tl.constexpr):
    tl.atomic_add(Y + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, BLOCK)))

x = torch.empty(64, device="meta")
for target in ("sm_90", "gfx942"):
    for n in (64, 63):
        r = compile_offline(copy, x, x, n, target=target, BLOCK=1024)
        print(r.wide_loads == r.loads > 0, r.faults, r.signature, 20 < r.instructions < 200)
    print(compile_offline(add, x, x, target=target, BLOCK=64).atomics > 0)
"""


def test_compiled_for_a_gpu_that_is_not_here(tmp_path):
    """Integers are specialised on their value: with a length that 16 does not divide, the mask
    splits the 128-bit accesses."""
    (tmp_path / "kernels_on_disk.py").write_text(
        COMPILED
    )  # the compiler reads a kernel's source file
    printed = python(
        f"import runpy; runpy.run_path({str(tmp_path / 'kernels_on_disk.py')!r})"
    ).splitlines()
    assert printed == 2 * [
        "True [] *fp32, *fp32, i32 True",
        "False [] *fp32, *fp32, i32 True",
        "True",
    ]


READ_ONCE = """
import torch
from custom_backprop import functional
from custom_backprop.testing import regimes

x = torch.empty(512, 1024, device="meta", requires_grad=True)
for function in (functional.rms_norm, functional.normalize):
    def call():
        y = function(x, (1024,)) if function is functional.rms_norm else function(x)
        torch.autograd.grad(y, x, torch.empty_like(y))

    for launch, r in zip(regimes.launches(call), regimes.compile_calls([call], "sm_90")):
        elements = launch.constexprs["ROWS"] * launch.constexprs["BLOCK"]
        print(r.kernel, 4 * 32 * r.num_warps * r.wide_loads // elements)
"""


def test_a_row_that_fits_a_block_is_read_once():
    """Though the kernel is written as two loops. (Norms load their first rows before the loop over
    rows, and in it the next ones.)"""
    assert python(READ_ONCE).splitlines() == [
        "norm._forward 1", "norm._backward 4", "normalize._forward 1", "normalize._backward 2",
    ]  # fmt: skip


def test_both_sides_of_every_branch_are_compiled(monkeypatch):
    """What the interpreter alone runs may not compile: 1 / p of the maximum norm, which is kept as
    p = 0, did not."""
    monkeypatch.setattr(
        selection, "why_not", lambda *_: None
    )  # the interpreter refuses meta tensors
    sides, orders = defaultdict(set), set()
    ops, optimizers = map(regimes.calls, database().values()), map(steps, OPTIMIZERS)
    for call in chain.from_iterable([*ops, *optimizers]):
        for launch in regimes.launches(call):
            kernel = f"{launch.kernel.fn.__module__}.{launch.kernel.__name__}"
            source = inspect.getsource(launch.kernel.fn)
            for name, argument in zip(launch.kernel.arg_names, launch.args, strict=False):
                if re.search(rf"\b{name} is (not )?None", source):
                    sides[kernel, name].add(argument is None)
            for name, value in launch.constexprs.items():
                if isinstance(value, bool) and name not in (
                    "A",
                    "B",
                    "C",
                ):  # which are an op's own, and not the kernel's
                    sides[kernel, name].add(value)
                elif name == "ORDER":
                    orders.add((kernel, value, launch.constexprs["SWAP"]))
    assert len(sides) > 50
    assert {key: seen for key, seen in sides.items() if len(seen) == 1} == {}
    assert {seen[1:] for seen in orders} == {
        (p, swap) for p in (0.0, 1.0, 2.0, 3.0) for swap in (False, True)
    }
    assert len(orders) == 16, "forward and backward"


def test_the_optimizers_are_audited_through_their_table(monkeypatch):
    """Clean as they are; not with gradients one element further on."""
    from custom_backprop.backends.kernels import kernels
    from custom_backprop.testing.optimizers import audit_optimizer

    found = audit_optimizer("AdamW")
    assert len(found.launches) == 3
    assert max(launch.programs for launch in found.launches) > 2
    assert not found.faults
    assert all(launch.moved > 4 * 9225 for launch in found.launches)
    table = kernels("optim").Table
    see = table.see

    def shifted(self, grads):
        moved = see(self, grads)[0].clone()
        moved[3] += grads[0].element_size()
        return moved, False

    monkeypatch.setattr(table, "see", shifted)
    assert all("loads outside every tensor" in fault for fault in audit_optimizer("SGD").faults)
    assert len(audit_optimizer("SGD").faults) == 3


def test_launches_an_op(monkeypatch):
    """No more kernels than the spec says: one more costs every call microseconds."""
    monkeypatch.setattr(selection, "why_not", lambda *_: None)  # of meta tensors
    more = {}
    for spec in database().values():
        forward, backward = regimes.launched(spec)
        if len(forward) > spec.launches[0] or len(backward) > spec.launches[1]:
            more[spec.name] = forward, backward
    assert more == {}
