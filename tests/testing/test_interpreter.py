"""Kernels of other projects run on CPU tensors, launched by their own code: each one below stands
for what such code does."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import python

from custom_backprop.backends import interpreting
from custom_backprop.testing import audit, interpreted, validate

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import triton.language.extra.libdevice as extra  # noqa: E402
from triton.language.extra.libdevice import tanh  # noqa: E402
from triton.language.math import exp2  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="these kernels run in the interpreter")


def _copy(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, i < n, other=0.0), i < n)


def _functions(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, tanh(x) + extra.rsqrt(x * x + 1) + extra.pow(exp2(x), x) + x.sum(0))


def _scaled(X, Y, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i) * eps.to(tl.float64))


def _products(X, Y, Z, M: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    x, y = tl.load(X + i * M + j), tl.load(Y + i * M + j)
    z = tl.dot(x, y).to(x.dtype)
    z = tl.maximum(z, y) + x * tl.sum(y, 1)[:, None]
    tl.store(Z + i * M + j, tl.where(z > 0, z, x))


def _counting(X, N, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 8)
    tl.atomic_add(N, tl.sum(tl.load(X + tl.arange(0, BLOCK))))


def _in_place(X, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(X + i, tl.load(X + i) * 2)


def _counted(Y, n):
    for i in range(1, n, 2):
        tl.store(Y + i.to(tl.int64), i)
    for i in tl.range(0, n, step=2):
        tl.store(Y + i.to(tl.int64), -i)


def _same_bits(Y):
    tl.store(Y, 7.0)


def _other_bits(Y):
    tl.store(Y, tl.program_id(0).to(tl.float32))


def _last_one_sums(X, Y, N):
    program = tl.program_id(0)
    tl.store(Y + program, tl.load(X + program))
    if tl.atomic_add(N, 1) == 2:
        tl.store(Y + 3, tl.load(Y) + tl.load(Y + 1))


@pytest.fixture(params=["decorated for a GPU", "decorated for the interpreter"])
def jit(request):
    return JITFunction if "GPU" in request.param else triton.jit


def launch(kernel, programs, *args, lenient=True, **constexprs):
    with interpreted(), audit(lenient=lenient) as seen:
        kernel[(programs,)](*args, **constexprs)
    (found,) = seen.launches
    return found


def held(owner):
    names = set(dir(owner)) - {"__annotations__", "__dict__"}
    return {name: inspect.getattr_static(owner, name) for name in names}


def test_a_kernel_runs_and_nothing_remains_patched(jit):
    from triton.runtime import autotuner, driver, interpreter
    from triton.runtime import jit as runtime

    owners = (
        runtime.JITFunction, autotuner.Autotuner, interpreter.InterpretedFunction, interpreter,
        interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.ReduceOps,
        driver, torch.cuda, torch.Tensor, tl, tl.core, tl.math, tl.tensor,
    )  # fmt: skip
    names = set(globals())
    before = [held(owner) for owner in owners]
    x, y = torch.randn(10), torch.empty(10)
    with interpreted(pretend_cuda=True):
        jit(_copy)[(3,)](x, y, 10, BLOCK=4)
        with interpreted(), torch.cuda.device(0):
            jit(_functions)[(1,)](torch.ones(4), torch.ones(4), BLOCK=4)
        assert torch.equal(x, y)
        assert x.is_cuda
        assert torch.empty(3, device="cuda").cuda().device.type == "cpu"
        assert torch.cuda.get_device_properties(0).multi_processor_count == 4
        assert triton.runtime.driver.active.get_current_target().arch == 80
    for owner, as_it_was in zip(owners, before, strict=True):
        as_it_is = held(owner)
        assert {n for n in as_it_is if as_it_is[n] is not as_it_was.get(n)} == set(), owner
    assert set(globals()) == names
    assert not x.is_cuda


def test_functions_of_libdevice(jit):
    x, y = torch.randn(8), torch.empty(8)
    launch(jit(_functions), 1, x, y, BLOCK=8)
    expected = x.tanh() + (x * x + 1).rsqrt() + x.exp2().pow(x) + x.sum()
    torch.testing.assert_close(y, expected)


def test_every_function_of_libdevice_has_its_numbers():
    """Those that have none say so."""
    import numpy as np

    from custom_backprop.testing.interpreter.libdevice import call_symbol

    x = np.float64([0.3, 0.7])
    t = torch.from_numpy(x)
    for symbol, expected in {
        "__nv_erff": t.erf(),
        "__nv_fast_expf": t.exp(),
        "__nv_fsqrt_rn": t.sqrt(),
        "__nv_tgamma": t.lgamma().exp(),
        "__nv_normcdf": torch.special.ndtr(t),
        "__nv_isnand": t.isnan(),
        "__nv_log1p": t.log1p(),
        "__nv_roundf": t.round(),
    }.items():
        np.testing.assert_allclose(call_symbol(symbol, x), expected.numpy(), rtol=1e-14)
    for symbol in ("__nv_fsqrt_ru", "__nv_byte_perm"):
        with pytest.raises(NotImplementedError, match=symbol):
            call_symbol(symbol, x)


def test_a_float_argument_is_rounded_as_for_a_gpu(jit):
    x, y = torch.ones(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    launch(jit(_scaled), 1, x, y, 0.1, BLOCK=4)
    assert y[0].item() == torch.tensor(0.1).double().item() != 0.1


def test_bfloat16(jit):
    x, y = torch.randn(2, 16, 16).bfloat16()
    z = torch.empty_like(x)
    launch(jit(_products), 1, x, y, z, M=16)
    product = (x.float() @ y.float()).bfloat16()
    expected = torch.maximum(product, y) + x * y.float().sum(1, keepdim=True).bfloat16()
    assert torch.equal(z, torch.where(expected > 0, expected, x))


def test_autotune_takes_the_first_configuration_that_runs(jit):
    """Of those that the kernel's own pruning leaves; and with its tensors as they should be."""
    configs = [triton.Config({"BLOCK": block}) for block in (32, 8, 16, 4)]
    kernel = triton.autotune(
        configs,
        key=[],
        reset_to_zero=["N"],
        prune_configs_by={"early_config_prune": lambda given, *_, **__: given[1:]},
    )(jit(_counting))
    n = torch.full((1,), 5.0)
    found = launch(kernel, 2, torch.ones(16), n)
    assert n.item() == 32
    assert found.faults == []
    assert found.notes == ["2 atomic operations"]


def test_autotuning_an_update_in_place_is_a_fault(jit):
    configs = [triton.Config({"BLOCK": 4}, num_warps=w) for w in (1, 2)]
    (fault,) = launch(triton.autotune(configs, key=[])(jit(_in_place)), 1, torch.ones(4)).faults
    assert "name it in restore_value" in fault
    for kernel in (
        triton.autotune(configs, key=[], restore_value=["X"])(jit(_in_place)),
        triton.autotune(configs[:1], key=[])(jit(_in_place)),
    ):
        x = torch.ones(4)
        assert launch(kernel, 1, x).faults == []
        assert x.tolist() == [2.0] * 4


def test_loops_count_in_tensors(jit):
    y = torch.empty(5)
    launch(jit(_counted), 1, y, 5)
    assert y.tolist() == [0, 1, -2, 3, -4]


def test_heuristics(jit):
    kernel = triton.heuristics({"BLOCK": lambda args: 2 * args["n"]})(jit(_copy))
    x, y = torch.randn(4), torch.empty(4)
    launch(kernel, 1, x, y, 4)
    assert torch.equal(x, y)


def test_a_kernel_made_in_a_function(jit):
    factor = 3.0

    def kernel(X):
        tl.store(X, tl.load(X) * factor)

    x = torch.ones(1)
    launch(jit(kernel), 1, x)
    assert x.item() == 3


def _tail(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i), i < 3)


def test_an_unmasked_tail_is_found_at_its_line(jit):
    (fault,) = launch(jit(_tail), 1, torch.ones(3), torch.ones(3), BLOCK=4).faults
    line = inspect.getsourcelines(_tail)[1] + 2
    assert fault == (
        f"1 loads outside every tensor, the first at test_interpreter.py:{line}, 0 bytes past the "
        "end of X"
    )


def test_a_race_is_a_fault_unless_every_program_stores_the_same(jit):
    assert launch(jit(_other_bits), 2, torch.zeros(1)).faults == [
        "Y: 1 of 1 elements written by several programs"
    ]
    found = launch(jit(_same_bits), 2, torch.zeros(1))
    assert found.faults == []
    assert "Y: 1 of 1 elements written by several programs, with the same bits" in found.notes
    assert len(launch(jit(_same_bits), 2, torch.zeros(1), lenient=False).faults) == 2


def test_programs_that_may_wait_for_each_other_are_not_judged(jit):
    n = torch.zeros(1, dtype=torch.int32)
    found = launch(jit(_last_one_sums), 3, torch.ones(3), torch.zeros(4), n)
    assert found.faults == []
    assert any("read by one program and written by another" in note for note in found.notes)


def test_kernels_of_another_project_are_compiled_in_the_process_that_ran_them(tmp_path):
    (tmp_path / "theirs.py").write_text(THEIRS)
    printed = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from custom_backprop.testing import interpreted, validate\n"
        "import theirs, torch\n"
        "for function in theirs.double, theirs.wrong:\n"
        "    with interpreted():\n"
        "        report = validate(function, torch.ones(64), checks=['forward', 'compiles'])\n"
        "    print(report.status('compiles'), report.results[-1].detail)\n"
    )
    right, wrong = printed.splitlines()
    assert right.startswith("right theirs.kernel on sm_90: ")
    assert " 0 bytes spilled, 16 bytes wide 0 of 1 loads and 0 of 1 stores" in right
    assert wrong.startswith("wrong ")
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"{target}: CompilationError" in wrong


THEIRS = """
import torch, triton, triton.language as tl
from triton.language.extra.libdevice import rint

@triton.autotune([triton.Config({"BLOCK": b}, num_warps=2) for b in (32, 64)], key=["n"])
@triton.jit
def kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, rint(tl.load(X + i, i < n).to(tl.float32) * 2), i < n)

@triton.jit
def changes_its_type(X, Y, n):
    total = 0
    for i in range(n):
        total += tl.load(X + i)
    tl.store(Y, total)

def double(x):
    y = torch.empty_like(x)
    with torch.cuda.device(0):
        kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y

def wrong(x):
    y = torch.empty(())
    changes_its_type[(1,)](x, y, x.numel())
    return y
"""


class Doubled(torch.autograd.Function):
    """y = 2 x by a kernel that takes a gradient to be contiguous, or does not."""

    @staticmethod
    def forward(ctx, x, contiguous=True, unwritten=0):
        ctx.contiguous = contiguous
        return Doubled.launched(x.contiguous(), unwritten)

    @staticmethod
    def launched(x, unwritten=0):
        y = torch.empty_like(x)
        _doubled[(2,)](x, y, x.numel() - unwritten, BLOCK=4)
        return y

    @staticmethod
    def backward(ctx, dy):
        return Doubled.launched(dy.contiguous() if ctx.contiguous else dy), None, None


@triton.jit
def _doubled(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, i < n) * 2, i < n)


def checked(function):
    (memory,) = validate(function, torch.ones(2, 3), checks=["memory"]).results
    return memory.status, memory.detail


def test_the_check_memory():
    assert checked(Doubled.apply) == ("right", "")
    status, detail = checked(lambda x: Doubled.apply(x, False))
    assert (status, "outside every tensor" in detail) == ("wrong", True)
    status, detail = checked(lambda x: Doubled.apply(x, True, 2))
    assert (status, "2 of 6 elements of result 0 depend on memory" in detail) == ("wrong", True)
    assert checked(torch.exp) == ("n/a", "no Triton kernel was launched")


def test_what_cannot_be_checked_here_says_so():
    with interpreted():
        report = validate(Doubled.apply, torch.ones(2, 3), checks=["compile", "compiles"])
    assert [r.status for r in report.results] == ["not run"] * 2
    assert "unset it" in report.results[1].detail
