"""What a step does on the host besides its arithmetic: threads, checks, hooks and profilers."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_helpers import (
    DEVICE,
    FULL,
    assert_equal,
    every_optimizer,
    give_gradients,
    needs_kernels,
    ours,
    parameters,
    stock,
    train,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from custom_backprop import optim
from custom_backprop.backends.kernels import kernels
from custom_backprop.optim import observers, pieces, signature, threads
from custom_backprop.optim.signature import guard


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(name: str, kwargs: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    params = parameters(dtype=torch.float32, shapes=shapes)
    train(ours(name)(params, **kwargs), params, 3, skip=False)
    return [p.detach() for p in params]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    "shapes",
    [[(7, 5)] * 12, [(7, 5), (300,)] * 9 + [(100,)], [(300,), (4,)]],
    ids=["small", "mixed", "few"],
)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [*FULL.items(), ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": False})],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_small_tensors_without_threads_give_the_same_bits(
    name: str,
    kwargs: dict[str, Any],
    shapes: list[tuple[int, ...]],
    clip: float | None,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        calls.append(1)
        threads.by_one_thread(kernel, *args, **options)

    kwargs = {**kwargs, "max_grad_norm": clip}
    monkeypatch.setattr(pieces, "PIECE", 2**18)
    monkeypatch.setattr(pieces, "SMALL", -1)
    monkeypatch.setattr(pieces, "ALONE", -1)
    shared = trained(name, kwargs, shapes)
    monkeypatch.setattr(pieces, "SMALL", 100)
    monkeypatch.setattr(pieces, "ALONE", 2**16)
    monkeypatch.setattr(pieces, "by_one_thread", counted)
    monkeypatch.setattr(optim.sgd, "by_one_thread", counted)
    alone = trained(name, kwargs, shapes)
    assert all(map(torch.equal, shared, alone))
    if len(set(shapes)) == 1:  # with other shapes, each optimizer decides
        assert calls


@pytest.mark.parametrize("name", ["RMSprop", "Lion", "SGD"])
def test_no_operator_of_a_small_piece_waits_for_another_thread(
    name: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of several operators on as many elements as two threads would divide."""
    if threads.openmp_setter() is None:
        pytest.skip("ATen's threads are not OpenMP's here")
    seen: set[int] = set()
    of_mkl = getattr(ctypes.PyDLL(torch._C.__file__), "MKL_Get_Max_Threads", torch.get_num_threads)

    class Look(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.update((torch.get_num_threads(), of_mkl()))
            return func(*args, **(kwargs or {}))

    options = {"fused": False, "dampening": 0.1} if name == "SGD" else {}
    options |= {"momentum": 0.9} if name != "Lion" else {}
    monkeypatch.setattr(pieces, "PIECE", 2**18)
    for total, expected in ((pieces.ALONE, {1}), (pieces.ALONE + 64, {2})):
        seen.clear()
        params = parameters(dtype=torch.float32, shapes=[(64,), (total - 64,)])
        optimizer = ours(name)(params, lr=0.1, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            group, plan, grads = optimizer._work()[0][0]
            hyper = {key: group[key] for key in optimizer._rule.hyper}
            plan.buckets[0].pieces  # noqa: B018 (they are made outside of the step's arithmetic)
            with Look(), torch.no_grad():
                optimizer._aten(group, plan.buckets[0], grads[0], hyper, 1.0)
        assert seen == expected


def test_the_number_of_threads_is_restored(two_threads: None) -> None:
    if threads.openmp_setter() is None:
        pytest.skip("ATen's threads are not OpenMP's here")
    seen: list[int] = []
    threads.by_one_thread(lambda: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        threads.by_one_thread(lambda: 1 // 0)
    assert torch.get_num_threads() == 2


def test_other_threads_are_not_affected(two_threads: None) -> None:
    seen: list[int] = []

    def look() -> None:
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()

    threads.by_one_thread(look)
    assert seen == [2]


def test_without_openmp_the_kernel_is_called_as_usual(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(threads, "openmp_setter", lambda: None)
    seen: list[int] = []
    threads.by_one_thread(lambda x, y: seen.extend((x, y)), 1, y=2)
    assert seen == [1, 2]


def one_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_hooks_added_and_removed_between_steps() -> None:
    seen: list[str] = []
    optimizer = optim.SGD([Parameter(torch.zeros(2))], lr=1.0)
    registrations = {
        "all before": register_optimizer_step_pre_hook,
        "before": optimizer.register_step_pre_hook,
        "after": optimizer.register_step_post_hook,
        "all after": register_optimizer_step_post_hook,
    }
    for name, register in registrations.items():
        one_step(optimizer)
        handle = register(lambda *_, name=name: seen.append(name))
        one_step(optimizer)
        handle.remove()
        one_step(optimizer)
    assert seen == list(registrations)
    handles = [
        register(lambda *_, name=name: seen.append(name))
        for name, register in registrations.items()
    ]
    one_step(optimizer)
    for handle in handles:
        handle.remove()
    assert seen[4:] == list(registrations)
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.full((2,), -13.0))


def test_a_hook_may_change_the_arguments() -> None:
    optimizer = optim.SGD([Parameter(torch.zeros(2))], lr=1.0)
    closures: list[str] = []
    optimizer.register_step_pre_hook(
        lambda it, args, kwargs: ((it, lambda: closures.append("other")), {})
    )
    optimizer.step(lambda: closures.append("given"))
    assert closures == ["other"]


def test_a_subclass_with_a_step_of_its_own_runs_hooks_once() -> None:
    class Twice(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return super().step(closure)

    seen: list[str] = []
    p = Parameter(torch.zeros(1))
    optimizer = Twice([p], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    one_step(optimizer)
    assert seen == ["before"]
    assert p.item() == -2


def test_a_profiler_sees_step_and_zero_grad_by_name() -> None:
    optimizer = optim.AdamW([Parameter(torch.zeros(2))])
    one_step(optimizer)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        one_step(optimizer)
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_an_execution_trace_sees_step_by_name(tmp_path: Path) -> None:
    """As does every other observer of PyTorch, even one that Python does not know about."""
    optimizer = optim.AdamW([Parameter(torch.zeros(2))])
    trace = torch.profiler.ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    trace.start()
    one_step(optimizer)
    optimizer.zero_grad()
    trace.stop()
    trace.unregister_callback()
    written = (tmp_path / "trace.json").read_text()
    assert "Optimizer.step#AdamW.step" in written
    assert "Optimizer.zero_grad#AdamW.zero_grad" in written


def test_without_the_symbol_in_torchs_library_python_finds_the_observers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sys.platform == "linux":
        assert observers.callback_query() is not None
    monkeypatch.setattr(observers.ctypes, "PyDLL", lambda name: object())
    assert observers.callback_query() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not observers.maybe_profiled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        assert observers.maybe_profiled()
        assert observers.is_profiled()
    assert not observers.is_profiled()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert observers.maybe_profiled()


def test_zero_grad() -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    params[0].grad = torch.ones(2)
    optimizer = optim.SGD(params, lr=1.0)
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is not None
    assert torch.equal(params[0].grad, torch.zeros(2))
    optimizer.zero_grad()
    assert [p.grad for p in params] == [None, None]


def test_zero_grad_compiled_is_no_break_in_a_graph() -> None:
    p = Parameter(torch.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)
    torch._dynamo.reset()
    p.grad = torch.ones(2)
    torch.compile(optimizer.zero_grad, backend="eager", fullgraph=True)()
    assert p.grad is None


def test_zero_grad_and_step_compiled() -> None:
    p = Parameter(torch.zeros(2))
    optimizer = optim.SGD([p], lr=1.0)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        p.grad = torch.ones(2)
        compiled()
        assert p.grad is None
    assert torch.equal(p, torch.full((2,), -3.0))


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a bucket looks at its gradients in Python."""
    seen: list[int] = []
    look = signature.Signature.inspected
    monkeypatch.setattr(
        signature.Signature, "inspected", lambda self, grads: seen.append(1) or look(self, grads)
    )
    return seen


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "no guards"])
@every_optimizer
def test_the_look_at_the_gradients_is_torchs_own_from_the_third_step_on(
    name: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of autocast or inference mode is checked twice in Python, for each of two memory
    layouts. The update is the same."""
    if not guarded:
        monkeypatch.setattr(signature, "guard", lambda tensors: None)
    seen = looks(monkeypatch)
    mine, theirs = parameters(), parameters()
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    if guarded and torch.__version__ < "2.16":  # the versions tested
        assert guard([torch.ones(1)]) is not None
    quick = guarded and guard([torch.ones(1)]) is not None
    for context in (
        nullcontext,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        nullcontext,
    ):
        seen.clear()
        for step in range(5):
            for optimizer, params in ((our, mine), (their, theirs)):
                give_gradients(params, step, skip=False)
                with context():
                    optimizer.step()
        assert len(seen) == (2 if quick else 5) * 2
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@pytest.fixture
def table_of_two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels' table of two parameters; what it sends; and four lists of gradients, of which
    the last has an odd address."""
    params, home = [torch.zeros(8, device=DEVICE) for _ in range(2)], torch.zeros(65, device=DEVICE)
    table = kernels("optim").Table(params, [None, None, None], None)
    sent: list[Any] = []
    on_host = table._on_host
    monkeypatch.setattr(table, "_on_host", lambda *args: sent.append(args) or on_host(*args))
    lists = [[home[i : i + 8], home[i + 8 : i + 16]] for i in (0, 16, 32)]
    return table, sent, [*lists, [home[:8], home[9:17]]]


@needs_kernels
def test_addresses_of_the_last_two_lists_of_gradients_are_not_sent_again(table_of_two: Any) -> None:
    """And the kernel would read 16 bytes at once of a gradient at an odd address."""
    table, sent, lists = table_of_two
    copies = []
    for i in (0, 0, 1, 0, 1, 1, 2, 1, 2, 0, 3, 0, 3, 3):
        found, aligned = table.see(lists[i])
        assert found[3].tolist() == [t.data_ptr() for t in lists[i]]
        assert aligned == (i < 3)
        copies.append(len(sent))
    assert copies == [1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5]
    odd = [lists[3][1], table.params[0]]
    assert not kernels("optim").Table(odd, [None, None, None], None).see(lists[0])[1]


@needs_kernels
def test_a_cuda_graph_has_a_table_to_itself(
    table_of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay writes its table again, from memory that must be as it was. Here the copies are
    made at once, as in a first replay."""
    table, _, lists = table_of_two
    before = table.see(lists[0])[0]
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(table, "device", torch.device("cuda"))
        capturing.setattr(
            table, "_on_host", lambda values, dtype: torch.tensor(values, dtype=dtype)
        )
        captured = [table.see(lists[i])[0] for i in (0, 1, 0)]
    alive = [t.data_ptr() for t in table._captured]
    assert len(set(alive)) == 6
    after = [table.see(lists[i])[0] for i in (0, 1, 2, 1)]
    assert after[0] is before
    assert not {t.data_ptr() for t in after} & set(alive)
    for found, i in zip(captured, (0, 1, 0), strict=True):
        assert found.data_ptr() in alive
        assert found[3].tolist() == [t.data_ptr() for t in lists[i]]
