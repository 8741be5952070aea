"""The launcher of kernels: what it refuses, what it keys its cache on, and what it hands to a
compiled kernel."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from custom_backprop.backends import interpreting
from custom_backprop.backends.kernels import kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction
pytestmark = pytest.mark.skipif(not interpreting(), reason="these kernels run in the interpreter")

launcher = kernels("launch")
kernel = launcher.kernel


def _double(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, 2 * tl.load(X + i, i < n).to(tl.float32), i < n)


DOUBLE = kernel(_double)


@kernel
def _powers(X, n, BLOCK: tl.constexpr):
    for i in range(tl.cdiv(n, BLOCK)):
        tl.store(X + i, 1 << i)


def launch(of, programs, *args, **named):
    """``of`` on its tensors and numbers in order."""
    tensors, numbers = args[: len(of.tensors)], args[len(of.tensors) :]
    of.launch(programs, **dict(zip(of.numbers, numbers, strict=True)), **named)(*tensors)


def test_a_loop_to_a_bound_that_is_no_constant():
    """The interpreter before triton 3.7 with numpy from 2.4 on: triton issue 9171."""
    x = torch.zeros(4, dtype=torch.int64)
    launch(_powers, 1, x, 5, BLOCK=2)
    assert x.tolist() == [1, 2, 4, 0]


def test_an_empty_grid_returns_early():
    x = torch.empty(3)
    launch(DOUBLE, 0, x, x, 3, BLOCK=4)


def test_tensors_on_two_devices():
    with pytest.raises(
        RuntimeError, match="_double to be on the same device, but found cpu and meta"
    ):
        launch(DOUBLE, 1, torch.empty(3), torch.empty(3, device="meta"), 3, BLOCK=4)


def test_no_tensor():
    with pytest.raises(RuntimeError, match="without a tensor"):
        launch(DOUBLE, 1, None, None, 3, BLOCK=4)


@pytest.mark.parametrize("named", [{}, {"BLOCK": 4, "m": 3}, {"BLOCK": 4, "M": 3}])
def test_names_that_are_missing_or_are_not_the_kernels(named):
    with pytest.raises(
        TypeError, match=r"_double takes the numbers \['n'\] and all of the constexprs"
    ):
        DOUBLE.launch(1, n=3, **named)


def test_arguments_out_of_order():
    def wrong(n, X, BLOCK: tl.constexpr):
        pass

    with pytest.raises(TypeError, match="tensors come first"):
        kernel(wrong)


def test_the_observer_sees_a_launch_and_meta_tensors_launch_nothing():
    seen = []
    x = torch.empty(5, device="meta")
    with launcher.observed(lambda *call: seen.append(call)):
        launch(DOUBLE, 2, x, x, 5, BLOCK=4, num_warps=8)
    launch(DOUBLE, 2, x, x, 5, BLOCK=4)
    assert seen == [(DOUBLE.jit, 2, (x, x, 5), {"BLOCK": 4}, {"num_warps": 8, "num_stages": 3})]


def test_bfloat16_is_rounded_to_nearest():
    x = torch.randn(7).bfloat16()
    y = torch.full((9,), 5.0).bfloat16()
    launch(DOUBLE, 2, x, y, 7, BLOCK=4)
    torch.testing.assert_close(y, torch.cat([2 * x, y[7:]]), rtol=0, atol=0)
    assert (y[7:] == 5).all()


def test_one_bfloat16_storage_under_two_names():
    buffer = torch.randn(12).bfloat16()
    before = buffer.clone()
    launch(DOUBLE, 1, buffer[:4], buffer[8:], 4, BLOCK=4)
    torch.testing.assert_close(buffer, torch.cat([before[:8], 2 * before[:4]]), rtol=0, atol=0)


def key(*args, warps=4, stages=3, **constexprs):
    """What a compiled kernel is found under: by its launch, and by the arguments of a call."""
    probe = copy.copy(DOUBLE)
    tensors = [a for a in args if a is None or isinstance(a, torch.Tensor)]
    numbers = {f"n{i}": n for i, n in enumerate(args[len(tensors) :])}
    probe.tensors, probe.numbers = [f"T{i}" for i in range(len(tensors))], list(numbers)
    probe._code = {}
    at_a_call = []
    probe._generated({}, {}, lambda key, *_, **__: at_a_call.append(key), 1, ())(
        *tensors, **numbers
    )
    options = {"num_warps": warps, "num_stages": stages}
    return probe.variant(numbers, options, constexprs), at_a_call


def aligned(dtype=torch.float32):
    return torch.empty(64, dtype=dtype)


class _OnGpu(torch.Tensor):
    """Memory of the CPU that says it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", self.index))

    def get_device(self):
        return self.index


def on_gpu(index):
    t = aligned().as_subclass(_OnGpu)
    t.index = index
    return t


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (key(aligned()), key(aligned(torch.bfloat16))),
        (key(aligned()), key(aligned()[1:])),
        (key(aligned()), key(None)),
        (key(16), key(17)),
        (key(16), key(2**31)),
        (key(1), key(3)),
        (key(1), key(True)),
        (key(1), key(1.0)),
        (key(2, N=4), key(2, N=8)),
        (key(2, N=0.0), key(2, N=-0.0)),
        (key(2, N=0), key(2, N=None)),
        (key(on_gpu(0)), key(on_gpu(1))),
        (key(on_gpu(0), on_gpu(0)), key(on_gpu(0), on_gpu(1))),
        (key(2, 16), key(16, 2)),
        (key(2), key(2, warps=8)),
        (key(2), key(2, stages=2)),
    ],
)
def test_the_key_tells_apart_what_the_compiler_does(one, other):
    assert one != other


def test_the_key_is_shared_where_the_compiler_makes_one_kernel():
    assert key(aligned(), 32, 0.5, False, N=4) == key(aligned()[4:], 64, 7.5, True, N=4)


class _Compiled:
    function, packed_metadata = "function", "packed"

    def __init__(self):
        self.calls = []

    def run(self, *args):
        self.calls.append(args)


class _Jit(JITFunction):
    """A function whose compilation gives a stub."""

    def __init__(self):
        super().__init__(_double)
        self.compiled, self.compilations = _Compiled(), []

    def run(self, *args, grid, warmup, **kwargs):
        self.compilations.append((args, grid, kwargs))
        return self.compiled


def compiling():
    """A kernel on a GPU, and its function."""
    of = kernel(_double)
    of.jit = _Jit()
    return of, of.jit


@pytest.fixture
def gpus(monkeypatch):
    """A driver of two GPUs, the first of them current. Says which device guards were entered and
    left."""
    current, seen = [0], []

    @contextmanager
    def guard(wanted):
        before, current[0] = current[0], getattr(wanted, "index", wanted)
        seen.append(f"enter {current[0]}")
        yield
        seen.append(f"exit {current[0]}")
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(
        torch._C,
        "_cuda_getCurrentRawStream",
        lambda index: f"stream {index} of {current[0]}",
        raising=False,
    )
    return seen


@pytest.mark.parametrize(("index", "guards"), [(0, []), (1, ["enter 1", "exit 1"])])
def test_a_compiled_kernel_gets_the_arguments_that_triton_gives_it(index, guards, gpus):
    """(grid x, y, z, stream, function, metadata, launch metadata, enter hook, exit hook,
    *arguments): triton/runtime/jit.py, 3.6 to 3.9, a tensor by its address, which is what the
    launchers of both backends take beside one.

    And it runs on the GPU of its tensors, not on the current one, which is the first.
    """
    (of, jit), x, y = compiling(), on_gpu(index), on_gpu(index)
    launch(of, 7, x, y, 48, BLOCK=16, num_warps=8, num_stages=2)
    assert jit.compilations == [((x, y, 48), (7,), {"BLOCK": 16, "num_warps": 8, "num_stages": 2})]
    assert not jit.compiled.calls
    gpus.clear()
    launch(of, 7, x, y, 64, BLOCK=16, num_warps=8, num_stages=2)
    assert len(jit.compilations) == 1
    stream = f"stream {index} of {index}"
    assert jit.compiled.calls == [
        (
            7,
            1,
            1,
            stream,
            "function",
            "packed",
            None,
            None,
            None,
            x.data_ptr(),
            y.data_ptr(),
            64,
            16,
        )
    ]
    assert gpus == guards


def test_a_compiled_kernel_lives_as_long_as_it_can_be_launched(gpus):
    """From triton 3.8 on its module is unloaded when it dies; the function that the driver is given
    would be gone."""
    of, jit = compiling()
    jit.compiled.run = lambda *args: None  # it does not refer to the compiled kernel
    launch(of, 7, on_gpu(0), on_gpu(0), 48, BLOCK=16)
    lives = weakref.ref(jit.compiled)
    del jit.compiled
    gc.collect()
    assert lives() is not None


def test_blocks_that_share_a_program(gpus):
    """Triton compiles for them, and what it packs for the driver says how many; another number is
    another kernel."""
    (of, jit), x = compiling(), on_gpu(0)
    for blocks in (1, 4, 4, 1):
        launch(of, 7, x, x, 48, BLOCK=16, num_ctas=blocks)
    assert [options.get("num_ctas") for *_, options in jit.compilations] == [None, 4]
    assert [call[0] for call in jit.compiled.calls] == [7, 7]


def test_a_plan_is_made_once():
    made = []

    @launcher.planned
    def plan(n, *parameters):
        made.append((n, *parameters))
        return DOUBLE.launch(7, n=n, BLOCK=16)

    assert plan(0, 0.0) is plan(0, 0.0)
    assert plan(0, -0.0) is not plan(0, 0.0)
    assert plan(1, 1.0, 2.0) is plan(1, 1.0, 2.0)
    assert list(map(str, made)) == ["(0, 0.0)", "(0, -0.0)", "(1, 1.0, 2.0)"]


def test_no_programs_do_not_find_what_others_compiled(gpus):
    (of, jit), x = compiling(), on_gpu(0)
    for programs in (7, 7, 0):
        launch(of, programs, x, x, 64, BLOCK=16)
    assert [call[0] for call in jit.compiled.calls] == [7]


def test_a_number_may_differ_at_every_call(gpus):
    (of, jit), x = compiling(), on_gpu(0)
    run = of.launch(7, BLOCK=16)
    assert (run.programs, run.numbers) == (7, {})
    for n in (48, 48, 64, 49):
        run(x, x, n=n)
    assert [args[2] for args, *_ in jit.compilations] == [48, 49]
    assert [call[11] for call in jit.compiled.calls] == [48, 64]


def test_an_absent_tensor_may_be_there_the_next_time(gpus):
    (of, jit), x, odd = compiling(), on_gpu(0), aligned()[1:].as_subclass(_OnGpu)
    odd.index = 0
    for y in (None, x, None, odd):
        launch(of, 7, x, y, 64, BLOCK=16)
    assert [args[1] is None for args, *_ in jit.compilations] == [True, False, False]
    assert len(jit.compiled.calls) == 1


def test_a_kernel_is_compiled_on_the_gpu_of_its_tensors(gpus):
    launch(compiling()[0], 1, on_gpu(1), on_gpu(1), 4, BLOCK=16)
    assert gpus == ["enter 1", "exit 1"]


def test_a_compiled_kernel_refuses_tensors_of_two_gpus(gpus):
    of, _ = compiling()
    launch(of, 1, on_gpu(0), on_gpu(0), 4, BLOCK=16)
    with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cuda:1"):
        launch(of, 1, on_gpu(0), on_gpu(1), 4, BLOCK=16)


def test_a_profilers_hook_sees_every_launch(gpus):
    (of, jit), x = compiling(), on_gpu(0)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        for _ in range(2):
            launch(of, 7, x, x, 64, BLOCK=16)
    finally:
        hook.remove(print)
    assert len(jit.compilations) == 2
    assert not jit.compiled.calls


def test_an_observer_sees_a_launch_from_the_cache(gpus):
    (of, jit), x, seen = compiling(), on_gpu(0), []
    launch(of, 7, x, x, 64, BLOCK=16)
    with launcher.observed(lambda *call: seen.append(call)):
        launch(of, 7, x, x, 64, BLOCK=16)
    assert seen == [(jit, 7, (x, x, 64), {"BLOCK": 16}, {"num_warps": 4, "num_stages": 3})]


@pytest.mark.parametrize("n", [*range(1, 10), 31, 32, 33, 2**31 - 1, 2**31, 2**40 + 1])
def test_sizes_on_the_host(n):
    assert launcher.next_power_of_2(n) == triton.next_power_of_2(n)
    assert [launcher.cdiv(n, b) for b in (1, 7, 1024)] == [triton.cdiv(n, b) for b in (1, 7, 1024)]
