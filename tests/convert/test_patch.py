"""patch(): torch.nn.functional is ours in a block, a function, a model's forward; and nowhere
else."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import custom_backprop
from custom_backprop.conversions.patch import unpatch

PATCH = importlib.import_module("custom_backprop.conversions.patch")


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATCH, "LEAST", 0)


class Model(torch.nn.Module):
    """Functions of which ours saves other tensors than stock's."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layer, self.reentrant = torch.nn.Linear(5, 5), reentrant

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.softsign(F.rms_norm(self.layer(x), (5,))), 0.25)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.reentrant is None:
            y = self.block(x)
        else:
            y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return F.cross_entropy(y, torch.arange(len(y)) if labels is None else labels)


def is_ours() -> bool:
    loss = F.cross_entropy(torch.randn(3, 4, requires_grad=True), torch.arange(3))
    return isinstance(loss.grad_fn, torch.autograd.function.BackwardCFunction)


def test_a_block_a_function_and_no_trace() -> None:
    before = dict(vars(F))
    with custom_backprop.patch():
        assert is_ours()
        with pytest.raises(ZeroDivisionError), custom_backprop.patch():
            raise ZeroDivisionError
        assert is_ours()  # the inner one has left this
        loss = torch.nn.CrossEntropyLoss()(torch.randn(3, 4, requires_grad=True), torch.arange(3))
        assert isinstance(loss.grad_fn, torch.autograd.function.BackwardCFunction)
    assert not is_ours()
    assert custom_backprop.patch()(is_ours)()
    assert vars(F) == before
    with pytest.raises(ZeroDivisionError), custom_backprop.patch():
        raise ZeroDivisionError
    assert not is_ours()
    assert vars(F) == before


def test_another_thread_sees_stock() -> None:
    seen: list[bool] = []
    entered, asked = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(10)
        seen.append(is_ours())
        with custom_backprop.patch():
            asked.set()
            seen.append(is_ours())

    thread = threading.Thread(target=other)
    thread.start()
    with custom_backprop.patch():
        entered.set()
        asked.wait(10)
    thread.join()
    assert seen == [False, True]
    assert not is_ours()


def test_another_task_sees_stock() -> None:
    async def inside() -> bool:
        with custom_backprop.patch():
            await asyncio.sleep(0)
            return is_ours()

    async def outside() -> bool:
        await asyncio.sleep(0)
        return is_ours()

    async def both() -> list[bool]:
        return await asyncio.gather(inside(), outside())

    assert asyncio.run(both()) == [True, False]


def test_a_models_forward_and_back() -> None:
    model = Model()
    stock, keys = type(model), list(model.state_dict())
    assert custom_backprop.patch(custom_backprop.patch(model)) is model
    x = torch.randn(4, 5)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    )  # fmt: skip
    for m in (model, *copies):
        assert isinstance(m(x).grad_fn, torch.autograd.function.BackwardCFunction)
        assert isinstance(m, stock)
        assert repr(m) == repr(Model())
        assert repr(type(m)) == repr(Model)
        assert inspect.signature(m.forward) == inspect.signature(Model().forward)
        assert list(m.state_dict()) == keys
        assert type(unpatch(m)) is stock
    assert not is_ours()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same_again(reentrant: bool) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    grads = []
    for model in (Model(), Model(reentrant)):
        torch.manual_seed(0)
        model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        custom_backprop.patch(model)(x).backward()
        grads += [x.grad]
        x.grad = None
    assert torch.equal(*grads)  # another dropout mask, if it were stock's


def test_compilers_exporters_and_transformations() -> None:
    model = custom_backprop.patch(Model().eval())
    x = torch.randn(4, 5, requires_grad=True)

    def softsigns(x: torch.Tensor) -> torch.Tensor:
        return F.softsign(x).sum()

    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    assert torch.isfinite(torch.compile(model, backend="aot_eager", fullgraph=True)(x))
    exported = torch.export.export(model, (x,))
    assert not any("custom_backprop" in str(n.target) for n in exported.graph.nodes)
    with custom_backprop.patch():
        compiled(x).backward()
        expected = 1 / (1 + x.detach().abs()) ** 2
        torch.testing.assert_close(torch.func.grad(softsigns)(x), expected)
        rows = torch.func.vmap(torch.func.grad(softsigns))(x)
        torch.testing.assert_close(rows, expected)
        graph = torch.fx.symbolic_trace(softsigns)
    assert F.softsign in [n.target for n in graph.graph.nodes]


class Knows(torch.Tensor):
    """A subclass that knows stock's function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return "known" if func is STOCK else super().__torch_function__(func, types, args, kwargs)


STOCK = F.softsign


def test_stock_where_ours_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.randn(3, requires_grad=True), torch.empty(3)
    with custom_backprop.patch():
        assert F.softsign(torch.ones(3).as_subclass(Knows)) == "known"
        assert F.logsigmoid(x.detach(), out=out) is out
        assert F.cross_entropy(torch.randn(0, 0), torch.empty(0, dtype=torch.int64)).isnan()
        assert isinstance(F.softsign(x).grad_fn, torch.autograd.function.BackwardCFunction)
        relu = F.relu(x).grad_fn  # a CPU gains nothing by it
        assert not isinstance(relu, torch.autograd.function.BackwardCFunction)
        elsewhere = F.relu(torch.empty(2, device="meta", requires_grad=True)).grad_fn
        assert isinstance(elsewhere, torch.autograd.function.BackwardCFunction)
        with custom_backprop.use_backend("formula"):
            assert isinstance(F.relu(x).grad_fn, torch.autograd.function.BackwardCFunction)
        monkeypatch.setattr(PATCH, "LEAST", x.numel() + 1)
        few = F.softsign(x).grad_fn
        assert not isinstance(few, torch.autograd.function.BackwardCFunction)


def test_what_others_have_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "softsign", len)
    with custom_backprop.patch():
        assert F.softsign is len
        monkeypatch.setattr(F, "logsigmoid", abs)
    assert (F.softsign, F.logsigmoid) == (len, abs)


def test_what_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match="Module"):
        custom_backprop.patch(3)  # type: ignore[call-overload]
    model = Model()
    model.forward = model.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="replaced on the object"):
        custom_backprop.patch(model)
