"""Threads that share the chunks of an op on a CPU."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as stock
from helpers import python
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import custom_backprop.functional as F
from custom_backprop.backends import tasks
from custom_backprop.backends.library import OPERATORS, _filled

pytestmark = pytest.mark.skipif(
    tasks.openmp_setter() is None, reason="ATen's threads are not OpenMP's here"
)

CPU = torch.device("cpu")

#: from so many elements on ATen divides a call among threads
GRAIN = 2**15
#: how the names of calls begin that compute nothing
IDLE = "aten::empty", "aten::new_", "aten::_unsafe_view"


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They share walks of a million elements, that are short enough for a test."""
    monkeypatch.setattr(tasks, "WHOLE", 0)
    monkeypatch.setattr(tasks, "FEWEST", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def ident(*_: Any) -> int:
    """A piece of work that says which thread does it, and leaves time for others to come."""
    time.sleep(0.005)
    return threading.get_ident()


def walkers(chunks: int = 8) -> set[int]:
    return set(tasks.each(CPU, ident, range(chunks)))


def test_threads_share_the_chunks_and_results_are_in_their_order() -> None:
    another = threading.Event()

    def work(chunk: int, memory: list[Tensor]) -> tuple[int, int, int]:
        assert torch.get_num_threads() == 1
        memory.append(torch.empty(0))
        assert another.wait(30) if chunk == 0 else another.set() is None
        return threading.get_ident(), chunk, len(memory)

    threads, chunks, calls = zip(*tasks.each(CPU, work, range(20)), strict=True)
    assert 2 <= len(set(threads)) <= 3
    assert chunks == tuple(range(20))
    assert max(calls) < 20  # each thread has memory of its own
    assert torch.get_num_threads() == 3


def test_who_walks_alone() -> None:
    me = {threading.get_ident()}
    assert walkers(tasks.FEWEST - 1) == me
    with torch.profiler.profile():
        assert walkers() == me
    with TorchDispatchMode():
        assert walkers() == me
    with torch.autocast("cpu"):
        assert walkers() == me
    assert tasks.each(CPU, lambda *_: walkers() == {threading.get_ident()}, range(6)) == [True] * 6
    assert set(tasks.each(torch.device("meta"), ident, range(6))) == me
    torch.set_num_threads(1)
    assert walkers() == me


def test_what_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision nothing is, as its copies in float32 would be as large."""
    monkeypatch.setattr(tasks, "WHOLE", 2**19)
    x = torch.empty(2**19)
    assert tasks.chunk_of(x) == len(x)
    assert tasks.chunk_of(x.new_empty(2**19 + 1)) == tasks.CHUNK
    assert tasks.chunk_of(x.half()) == tasks.CHUNK


def test_an_exception_reaches_the_caller_and_ends_the_walk() -> None:
    begun: list[int] = []
    raised = threading.Event()

    def work(chunk: int, _: Any) -> None:
        begun.append(chunk)
        if threading.current_thread() is not threading.main_thread():
            raised.set()
            raise ZeroDivisionError
        assert raised.wait(30)
        time.sleep(0.005)

    with pytest.raises(ZeroDivisionError) as found:
        tasks.each(CPU, work, range(100))
    assert "in work" in "".join(traceback.format_tb(found.tb))
    assert len(begun) < 100
    assert torch.get_num_threads() == 3


def test_after_a_fork_there_are_new_threads() -> None:
    code = """if True:
        import os, threading, torch
        from custom_backprop.backends import tasks

        def walkers():
            another = threading.Event()

            def work(chunk, _):
                another.wait(10) if chunk == 0 else another.set()
                return threading.get_ident()

            return len(set(tasks.each(torch.device("cpu"), work, range(40))))

        torch.set_num_threads(2)
        count = walkers()
        if not (child := os.fork()):
            os._exit(10 * count + walkers())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert int(python(code)) == 22


def test_without_threads_the_caller_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    tasks._pool.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        assert walkers() == {threading.get_ident()}
    assert len(tasks.each(CPU, ident, range(8))) == 8


def test_inference_mode_is_the_callers() -> None:
    with torch.inference_mode():
        x, index = torch.randn(512, 2048), torch.zeros(512, dtype=torch.int64)
        assert F.cross_entropy(x, index).is_inference()
        assert F.kl_div(x, x, reduction="none").is_inference()


def gradients(function: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    leaves = [
        t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t
        for t in inputs
    ]
    y = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), wanted, allow_unused=True)]


def many(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def classes(*shape: int) -> tuple[Tensor, Tensor]:
    return many(*shape), torch.arange(shape[0]) % shape[1]


PAIR = many(2**10, 2**10), many(2**10, 2**10).flip(1)
NAMES = "binary_cross_entropy_with_logits", "kl_div", "l1_loss", "poisson_nll_loss"
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "cross_entropy": (F.cross_entropy, classes(2**10, 2**10)),
    "wide cross_entropy": (partial(F.cross_entropy, label_smoothing=0.1), classes(64, 32000)),
    "triplet_margin_loss": (F.triplet_margin_loss, (*PAIR, many(2**20).view(2**10, -1))),
    "info_nce": (F.info_nce, (many(2**11, 8), many(2**11, 8).flip(1))),
    "dropout": (partial(F.dropout, seed=torch.tensor(3)), PAIR[:1]),
    "prelu": (F.prelu, (PAIR[0] - 0.5, many(1))),
    **{name: (partial(getattr(F, name), reduction="sum"), PAIR) for name in NAMES},
}


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    function, inputs = CASES[name]
    shared = gradients(function, *inputs)
    with ThreadPoolExecutor(3) as pool:
        at_once = [pool.submit(gradients, function, *inputs) for _ in range(3)]
    torch.set_num_threads(1)
    alone = gradients(function, *inputs)
    for found in (shared, *(run.result() for run in at_once)):
        assert all(map(torch.equal, found, alone))


class Regions(TorchDispatchMode):
    """Counts the calls that ATen divides among all threads. It looks inside of our operators, and
    does not let its presence end the sharing of chunks."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            with self:
                return _filled(OPERATORS[func].aten)(*args)
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        large = max((t.numel() for t in tensors), default=0) >= GRAIN
        computes = not func.is_view and not func.name().startswith(IDLE)
        self.count += large and computes and torch.get_num_threads() > 1
        return result


def regions_of(function: Callable[..., Tensor], *inputs: Any) -> int:
    """Forward and backward."""
    with Regions() as regions:
        gradients(function, *inputs)
    return regions.count


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"dropout"}))  # watched, it draws by Philox
def test_openmp_regions_are_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two for each thread, forward and backward."""
    function, inputs = CASES[name]
    monkeypatch.setattr(tasks, "_is_watched", lambda: False)
    assert regions_of(function, *inputs) <= 2 * 3


#: as PyTorch's own operators, on the gate and the value
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reglu": lambda a, b: torch.relu(a) * b,
    "geglu": lambda a, b: stock.gelu(a) * b,
    "swiglu": lambda a, b: stock.silu(a) * b,
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("packed", [True, False])
def test_gates_divide_no_more_calls_than_stock(name: str, packed: bool) -> None:
    halves = [many(2**9, 2**9), many(2**9, 2**9).flip(1)]
    given = [torch.cat(halves, 1)] if packed else halves

    def of_stock(*given: Tensor) -> Tensor:
        return GATES[name](*(given[0].chunk(2, 1) if packed else given))

    # f(a) is computed again in backward, where stock has saved it; for two tensors, that is one
    # more, and for one no halves are put together
    ours = regions_of(partial(getattr(F, name), gate_first=True), *given)
    assert ours <= regions_of(of_stock, *given) + (not packed)


CHANNELS = many(2**5, 2**5, 2**5, 2**5)
WEIGHTS = many(2**5), many(2**5).flip(0)
#: name, as stock's -> inputs
AS_STOCK: dict[str, tuple[Any, ...]] = {
    "tanhshrink": PAIR[:1],
    "softsign": PAIR[:1],
    "embedding_bag": (torch.arange(2**16).view(-1, 8) % 64, many(64, 8)),
    "dropout2d": (CHANNELS,),
    "feature_alpha_dropout": (CHANNELS, 0.5, True),
    "batch_norm": (CHANNELS, None, None, *WEIGHTS, True),
    "instance_norm": (CHANNELS, None, None, *WEIGHTS),
    "group_norm": (CHANNELS, 2**3, *WEIGHTS),
}


@pytest.mark.parametrize("name", AS_STOCK)
def test_few_passes_divide_no_more_calls_than_stock(name: str) -> None:
    """Too few to be worth chunks."""
    ours, of_stock = (regions_of(getattr(f, name), *AS_STOCK[name]) for f in (F, stock))
    assert 0 < ours <= of_stock
