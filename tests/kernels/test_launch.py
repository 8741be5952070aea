"""The launcher of kernels: what it refuses, what it keys its cache on, and what it hands to a
compiled kernel."""

from __future__ import annotations

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
launch = launcher.launch


@triton.jit
def _double(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, 2 * tl.load(X + i, i < n).to(tl.float32), i < n)


@triton.jit
def _add(X, Y, Z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Z + i, tl.load(X + i, i < n) + tl.load(Y + i, i < n), i < n)


@triton.jit
def _powers(X, n, BLOCK: tl.constexpr):
    for i in range(tl.cdiv(n, BLOCK)):
        tl.store(X + i, 1 << i)


def test_a_loop_to_a_bound_that_is_no_constant():
    """The interpreter before triton 3.7 with numpy from 2.4 on: triton issue 9171."""
    x = torch.zeros(4, dtype=torch.int64)
    launch(_powers, 1, x, 5, BLOCK=2)
    assert x.tolist() == [1, 2, 4, 0]


def test_an_empty_grid_returns_early():
    launch(_double, 0)


def test_tensors_on_two_devices():
    with pytest.raises(
        RuntimeError, match="_double to be on the same device, but found cpu and meta"
    ):
        launch(_double, 1, torch.empty(3), torch.empty(3, device="meta"), 3, BLOCK=4)


def test_no_tensor():
    with pytest.raises(RuntimeError, match="without a tensor"):
        launch(_double, 1, None, None, 3, BLOCK=4)


def test_constexprs_out_of_order():
    x = torch.empty(3)
    with pytest.raises(
        TypeError, match=r"\['BLOCK'\], all of them and in this order, but was given \[\]"
    ):
        launch(_double, 1, x, x, 3)


def test_the_observer_sees_a_launch_and_meta_tensors_launch_nothing():
    seen = []
    x = torch.empty(5, device="meta")
    with launcher.observed(lambda *call: seen.append(call)):
        launch(_double, 2, x, x, 5, BLOCK=4, num_warps=8)
    launch(_double, 2, x, x, 5, BLOCK=4)
    assert seen == [(_double, 2, (x, x, 5), {"BLOCK": 4}, {"num_warps": 8, "num_stages": 3})]


def test_bfloat16_is_rounded_to_nearest():
    x = torch.randn(7).bfloat16()
    y = torch.full((9,), 5.0).bfloat16()
    launch(_double, 2, x, y, 7, BLOCK=4)
    torch.testing.assert_close(y, torch.cat([2 * x, y[7:]]), rtol=0, atol=0)
    assert (y[7:] == 5).all()


def test_one_bfloat16_storage_under_two_names():
    buffer = torch.randn(12).bfloat16()
    before = buffer.clone()
    launch(_double, 1, buffer[:4], buffer[8:], 4, BLOCK=4)
    torch.testing.assert_close(buffer, torch.cat([before[:8], 2 * before[:4]]), rtol=0, atol=0)


def key(*args, kernel=_double, warps=4, stages=3, **constexprs):
    tensors = sum(a is None or isinstance(a, torch.Tensor) for a in args)
    key_of, _ = launcher._written_out(tensors, len(args) - tensors, {}, None, ())
    return launcher._variant(kernel, warps, stages, constexprs), key_of(*args)


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
        (key(2), key(2, kernel=_add)),
        (key(on_gpu(0)), key(on_gpu(1))),
        (key(on_gpu(0), on_gpu(0)), key(on_gpu(0), on_gpu(1))),
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


class _Kernel(JITFunction):
    """A kernel whose compilation gives a stub."""

    def __init__(self):
        super().__init__(_double.fn)
        self.compiled, self.compilations = _Compiled(), []

    def run(self, *args, grid, warmup, **kwargs):
        self.compilations.append((args, grid, kwargs))
        return self.compiled


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
    monkeypatch.setattr(launcher, "_bound", {})
    return seen


@pytest.mark.parametrize(("index", "guards"), [(0, []), (1, ["enter 1", "exit 1"])])
def test_a_compiled_kernel_gets_the_arguments_that_triton_gives_it(index, guards, gpus):
    """(grid x, y, z, stream, function, metadata, launch metadata, enter hook, exit hook,
    *arguments): triton/runtime/jit.py, 3.6 to 3.9, a tensor by its address, which is what the
    launchers of both backends take beside one.

    And it runs on the GPU of its tensors, not on the current one, which is the first.
    """
    kernel, x, y = _Kernel(), on_gpu(index), on_gpu(index)
    launch(kernel, 7, x, y, 48, BLOCK=16, num_warps=8, num_stages=2)
    assert kernel.compilations == [
        ((x, y, 48), (7,), {"BLOCK": 16, "num_warps": 8, "num_stages": 2})
    ]
    assert not kernel.compiled.calls
    gpus.clear()
    launch(kernel, 7, x, y, 64, BLOCK=16, num_warps=8, num_stages=2)
    assert len(kernel.compilations) == 1
    stream = f"stream {index} of {index}"
    assert kernel.compiled.calls == [
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


def test_a_bound_launcher_that_is_kept(gpus):
    kernel, x, made = _Kernel(), on_gpu(0), []

    @launcher.kept
    def bound(scale, *more):
        made.append((scale, *more))
        return launcher.bind(kernel, 2, 1, BLOCK=16, num_warps=8)

    for n in (48, 64, 49):
        bound(0.0)(7, x, x, n)
    bound(0.0)(0, x, x, 48)
    assert len(kernel.compilations) == 2
    assert kernel.compilations[1] == (
        (x, x, 49),
        (7,),
        {"BLOCK": 16, "num_warps": 8, "num_stages": 3},
    )
    assert [call[11] for call in kernel.compiled.calls] == [64]
    assert bound(-0.0) is not bound(0.0)
    assert bound(1.0, 2.0) is bound(1.0, 2.0)
    assert list(map(str, made)) == ["(0.0,)", "(-0.0,)", "(1.0, 2.0)"]


def test_an_absent_tensor_may_be_there_the_next_time(gpus):
    kernel, x, odd = _Kernel(), on_gpu(0), aligned()[1:].as_subclass(_OnGpu)
    odd.index = 0
    for y in (None, x, None, odd):
        launch(kernel, 7, x, y, 64, BLOCK=16)
    assert [args[1] is None for args, *_ in kernel.compilations] == [True, False, False]
    assert len(kernel.compiled.calls) == 1


def test_a_kernel_is_compiled_on_the_gpu_of_its_tensors(gpus):
    launch(_Kernel(), 1, on_gpu(1), on_gpu(1), 4, BLOCK=16)
    assert gpus == ["enter 1", "exit 1"]


def test_a_compiled_kernel_refuses_tensors_of_two_gpus(gpus):
    kernel = _Kernel()
    launch(kernel, 1, on_gpu(0), on_gpu(0), 4, BLOCK=16)
    with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cuda:1"):
        launch(kernel, 1, on_gpu(0), on_gpu(1), 4, BLOCK=16)


def test_a_profilers_hook_sees_every_launch(gpus):
    kernel, x = _Kernel(), on_gpu(0)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        for _ in range(2):
            launch(kernel, 7, x, x, 64, BLOCK=16)
    finally:
        hook.remove(print)
    assert len(kernel.compilations) == 2
    assert not kernel.compiled.calls


def test_an_observer_sees_a_launch_from_the_cache(gpus):
    kernel, x, seen = _Kernel(), on_gpu(0), []
    launch(kernel, 7, x, x, 64, BLOCK=16)
    with launcher.observed(lambda *call: seen.append(call)):
        launch(kernel, 7, x, x, 64, BLOCK=16)
    assert seen == [(kernel, 7, (x, x, 64), {"BLOCK": 16}, {"num_warps": 4, "num_stages": 3})]


@pytest.mark.parametrize("n", [*range(1, 10), 31, 32, 33, 2**31 - 1, 2**31, 2**40 + 1])
def test_sizes_on_the_host(n):
    assert launcher.next_power_of_2(n) == triton.next_power_of_2(n)
    assert [launcher.cdiv(n, b) for b in (1, 7, 1024)] == [triton.cdiv(n, b) for b in (1, 7, 1024)]
