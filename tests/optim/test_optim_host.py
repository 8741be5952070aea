"""What surrounds an optimizer's arithmetic on a CPU: who computes a small tensor, and who looks at
a step."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from custom_backprop import optim
from custom_backprop.optim import bucket as buckets
from custom_backprop.optim import observers, threads

#: each optimizer with all its states
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "fused": False}),
    ("Adagrad", {}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("Lion", {"weight_decay": 0.1}),
]


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(
    name: str, kwargs: dict[str, Any], shapes: list[tuple[int, ...]], **more: Any
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = getattr(optim, name)(params, lr=0.1, **kwargs, **more)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    "shapes",
    [[(7, 5)] * 12, [(7, 5), (300,)] * 9 + [(3,)], [(300,), (4,)]],
    ids=["small", "mixed", "few"],
)
@pytest.mark.parametrize(
    ("name", "kwargs"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v)
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
        calls.append(len(args[0]))
        threads.by_one_thread(kernel, *args, **options)

    monkeypatch.setattr(buckets, "SMALL", -1)
    shared = trained(name, kwargs, shapes, max_grad_norm=clip)
    monkeypatch.setattr(buckets, "SMALL", 100)
    monkeypatch.setattr(buckets, "by_one_thread", counted)
    monkeypatch.setattr(optim.sgd, "by_one_thread", counted)
    alone = trained(name, kwargs, shapes, max_grad_norm=clip)
    assert all(map(torch.equal, shared, alone))
    if len(set(shapes)) == 1:  # among others, it is for each optimizer to say
        assert calls


def test_threads_are_given_back(two_threads: None) -> None:
    if threads._openmp() is None:
        pytest.skip("ATen's threads are not OpenMP's here")
    seen: list[int] = []
    threads.by_one_thread(lambda: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        threads.by_one_thread(lambda: 1 // 0)
    assert torch.get_num_threads() == 2


def test_other_threads_keep_theirs(two_threads: None) -> None:
    seen: list[int] = []

    def look() -> None:
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()

    threads.by_one_thread(look)
    assert seen == [2]


def test_without_openmp_the_kernel_is_called_as_ever(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    seen: list[int] = []
    threads.by_one_thread(lambda x, y: seen.extend((x, y)), 1, y=2)
    assert seen == [1, 2]


def one_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_hooks_given_and_taken_away_between_steps() -> None:
    seen: list[str] = []
    optimizer = optim.SGD([Parameter(torch.zeros(2))], lr=1.0)
    ways = {
        "all before": register_optimizer_step_pre_hook,
        "before": optimizer.register_step_pre_hook,
        "after": optimizer.register_step_post_hook,
        "all after": register_optimizer_step_post_hook,
    }
    for name, register in ways.items():
        one_step(optimizer)
        handle = register(lambda *_, name=name: seen.append(name))
        one_step(optimizer)
        handle.remove()
        one_step(optimizer)
    assert seen == list(ways)
    handles = [register(lambda *_, name=name: seen.append(name)) for name, register in ways.items()]
    one_step(optimizer)
    for handle in handles:
        handle.remove()
    assert seen[4:] == list(ways)
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
    """As does whatever else PyTorch calls back for what runs: it need not be known to Python."""
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


def test_without_a_name_in_torchs_library_python_says_who_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sys.platform == "linux":
        assert observers._recorded() is not None
    monkeypatch.setattr(observers.ctypes, "PyDLL", lambda name: object())
    assert observers._recorded() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not observers._perhaps_recorded()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        assert observers._perhaps_recorded()
        assert observers.is_profiled()
    assert not observers.is_profiled()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert observers._perhaps_recorded()


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
