"""Logits that a vocabulary head does not compute until somebody asks for them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks

import custom_backprop
from custom_backprop import functional, nn
from custom_backprop.conversions import deferred
from custom_backprop.conversions.deferred import Deferred
from custom_backprop.conversions.patch import unpatch

C, H = 40, 8
IDS = torch.arange(12).reshape(2, 6) % C
LABELS = torch.where(IDS % 5 == 0, -100, IDS)


class Model(torch.nn.Module):
    """A language model of one layer, which returns logits and, with labels, the loss of them."""

    def __init__(self, dtype: torch.dtype = torch.float32, linear: Any = torch.nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(C, H, dtype=dtype)
        self.body = torch.nn.Linear(H, H, dtype=dtype)
        self.head = linear(H, C, dtype=dtype)
        self.step: Any = lambda logits: logits.float().view(-1, C)
        self.options: dict[str, Any] = {}

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(self.table(ids)).tanh())
        if labels is None:
            return logits
        rows = self.step(logits)
        labels = labels.reshape(-1)[: len(rows)]
        return F.cross_entropy(rows, labels, **self.options), logits


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "LEAST", 1)


def twins(**options: Any) -> tuple[Model, Model]:
    model = Model(**options)
    return model, custom_backprop.patch(copy.deepcopy(model))


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


STEPS = {
    "a view": lambda logits: logits.view(-1, C),
    "float": lambda logits: logits.float().view(-1, C),
    "shifted": lambda logits: logits[..., :-1, :].contiguous().view(-1, C),
    "a sample": lambda logits: logits[1],
    "flattened": lambda logits: logits.to(logits.device).to(torch.float32).flatten(0, 1),
    "reshaped": lambda logits: torch.reshape(logits[:, 1:], (-1, C)),
    "capped": lambda logits: (torch.tanh(logits / 3.0) * 3.0).float().view(-1, C),
}
OPTIONS: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 3, "label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 2, C)},
    {"size_average": False},
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("linear", [torch.nn.Linear, nn.Linear])
def test_the_loss_never_makes_logits(step: str, linear: Any) -> None:
    model, patched = twins(linear=linear)
    model.step = patched.step = STEPS[step]
    agree(model, patched)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:size_average")
def test_every_option_of_the_loss(options: dict[str, Any]) -> None:
    model, patched = twins()
    model.options = patched.options = options
    agree(model, patched, torch.where(LABELS < 0, options.get("ignore_index", -100), LABELS))


def agree(model: Model, patched: Model, labels: Tensor = LABELS) -> None:
    (loss, logits), (ours, theirs) = (m(IDS, labels) for m in (model, patched))
    assert type(theirs) is Deferred
    assert not theirs.is_made()
    assert ours.dtype == loss.dtype
    torch.testing.assert_close(ours, loss)
    for _, value in ((model, loss), (patched, ours)):
        value.sum().backward()
    for a, b in zip(gradients(patched), gradients(model), strict=True):
        torch.testing.assert_close(a, b)
    assert not theirs.is_made()
    assert (theirs.shape, theirs.dtype) == (logits.shape, logits.dtype)
    assert theirs.requires_grad
    assert torch.equal(theirs, logits)  # which makes them
    assert theirs.is_made()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_accurate_as_stocks(autocast: bool) -> None:
    model, patched = twins(dtype=torch.float32 if autocast else torch.bfloat16)
    exact = copy.deepcopy(model).double()
    exact.step = lambda logits: logits.view(-1, C)
    ids = torch.randint(C, (8, 64))
    for m in (exact, model, patched):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and m is not exact):
            loss, logits = m(ids, ids.roll(1))
        loss.backward()
        assert loss.dtype == (torch.float64 if m is exact else torch.float32)
        assert logits.dtype == (torch.float64 if m is exact else torch.bfloat16)
    assert not logits.is_made()
    true, stock, ours = map(gradients, (exact, model, patched))
    assert [g.dtype for g in ours] == [g.dtype for g in stock]
    norms = [t.norm() for t in true]
    errors = [
        sum(((g - t) / norm).square().sum() for g, t, norm in zip(found, true, norms, strict=True))
        for found in (ours, stock)
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("is_on", [False, True])
def test_a_loss_after_autocast_or_inside_it(is_on: bool) -> None:
    """The product is that of the head's autocast; the loss has the dtype that stock's has."""
    model, patched = twins()
    weight, bias = (t.detach().bfloat16().double() for t in (model.head.weight, model.head.bias))
    for as_it_is in (True, False):
        losses = []
        for m in (model, patched):
            with torch.autocast("cpu", torch.bfloat16):
                logits = m(IDS)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                rows = (logits if as_it_is else logits.float()).view(-1, C)
                losses.append(F.cross_entropy(rows, LABELS.view(-1)))
        assert losses[0].dtype == losses[1].dtype
        assert not logits.is_made()
    exact = F.linear(logits.x.bfloat16().double(), weight, bias).view(-1, C)
    exact = F.cross_entropy(exact, LABELS.view(-1)).float()
    torch.testing.assert_close(losses[1], exact, rtol=1e-6, atol=0)


USES: dict[str, Any] = {
    "argmax": lambda logits: logits.argmax(-1),
    "softmax": lambda logits: F.softmax(logits, -1),
    "an element": lambda logits: logits[0, 1, 2],
    "masked": lambda logits: logits[LABELS != -100],
    "other dimensions": lambda logits: F.cross_entropy(logits.transpose(1, 2), LABELS),
    "probabilities": lambda logits: F.cross_entropy(logits.view(-1, C), torch.ones(12, C) / C),
    "numbers": lambda logits: logits.detach().numpy(),
    "a list": lambda logits: torch.tensor(logits.tolist()),
    "on a CPU": lambda logits: logits.cpu() + 0,
    "pickled": lambda logits: pickle.loads(pickle.dumps(logits.detach())),
    "printed": lambda logits: torch.tensor([ord(c) for c in repr(logits.detach())]),
    "halfway to a cap": lambda logits: F.cross_entropy((logits / 3).view(-1, C), LABELS.view(-1)),
    "half a cap": lambda logits: (logits / 3).tanh() * 2,
    "in place": lambda logits: logits.div_(3),
    "sizes": lambda logits: torch.tensor([len(logits), logits.numel(), *logits.stride()]),
    "strides": lambda logits: torch.tensor(logits[:, 1:].stride()),
    "classes between": lambda logits: F.cross_entropy(logits, torch.zeros(2, C, dtype=torch.int64)),
    "without a graph": lambda logits: torch.no_grad()(lambda: logits.float().view(-1, C) * 2)(),
}


@pytest.mark.parametrize("use", USES)
def test_whoever_asks_gets_stocks_logits(use: str) -> None:
    model, patched = twins()
    wanted, found = (USES[use](m(IDS)) for m in (model, patched))
    assert type(found) is type(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    if isinstance(wanted, Tensor) and wanted.requires_grad:
        for _, y in ((model, wanted), (patched, found)):
            y.square().sum().backward()
        for a, b in zip(gradients(patched), gradients(model), strict=True):
            torch.testing.assert_close(a, b)


def test_asked_for_without_a_gradient_first() -> None:
    model, patched = twins()
    logits, kept = patched(IDS), patched(IDS)
    with torch.no_grad():
        assert not (logits * 2).requires_grad
        rows = kept.double()
    assert not rows.requires_grad
    assert not (rows * 2).requires_grad
    F.cross_entropy(logits.view(-1, C), LABELS.view(-1)).backward()
    F.cross_entropy(model(IDS).view(-1, C), LABELS.view(-1)).backward()
    for a, b in zip(gradients(patched), gradients(model), strict=True):
        torch.testing.assert_close(a, b)


def test_logits_changed_in_place_are_the_changed_ones() -> None:
    losses = []
    for m in twins():
        logits = m(IDS)
        logits[..., 3] = -2.0
        losses.append(F.cross_entropy(logits.view(-1, C), LABELS.view(-1)))
        rows = m(IDS).view(-1, C)
        rows.mul_(2)
        losses.append(F.cross_entropy(rows, LABELS.view(-1)))
    torch.testing.assert_close(losses[:2], losses[2:], rtol=0, atol=0)
    logits = m(IDS)
    before = logits.view(-1, C)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        before + 1


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_logits_of_an_older_weight_raise(which: str) -> None:
    _, patched = twins()
    loss, logits = patched(IDS, LABELS)
    loss.backward()
    kept = patched(IDS)
    asked = patched(IDS)
    numbers = asked.detach().clone()
    with torch.no_grad():
        getattr(patched.head, which).mul_(2)
    for late in (lambda: logits + 1, lambda: F.cross_entropy(kept.view(-1, C), LABELS.view(-1))):
        with pytest.raises(RuntimeError, match=f"{which} of their head had changed"):
            late()
    assert torch.equal(asked, numbers)


@pytest.mark.parametrize("optimizer", [custom_backprop.optim.AdamW, torch.optim.AdamW])
def test_logits_from_before_an_optimizers_step_raise(optimizer: Any) -> None:
    _, patched = twins()
    loss, logits = patched(IDS, LABELS)
    loss.backward()
    optimizer(patched.parameters(), fused=True).step()  # which leaves the parameters' versions
    with pytest.raises(RuntimeError, match="optimizer's step"):
        logits.argmax(-1)
    del loss, logits
    assert not _global_optimizer_post_hooks


def test_no_gradient_of_logits_that_were_never_made() -> None:
    _, patched = twins()
    _, logits = patched(IDS, LABELS)
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.retain_grad()
    assert logits.isfinite().all()
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.register_hook(print)
    logits = patched(IDS)
    logits.retain_grad()
    F.cross_entropy(logits.view(-1, C), LABELS.view(-1)).backward()
    assert logits.grad.shape == logits.shape


def test_a_function_mode_changes_nothing() -> None:
    model, patched = twins()
    with torch.device("cpu"):
        agree(model, patched)


def is_deferred(model: Model) -> bool:
    return isinstance(model(IDS), Deferred)


def test_who_gets_plain_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = twins()
    assert is_deferred(patched)
    assert not isinstance(patched.head(torch.randn(2, H)), Deferred)  # not in the model's forward
    with torch.no_grad():
        assert not is_deferred(patched)
    hook = patched.head.register_forward_hook(lambda *_: None)
    assert not is_deferred(patched)
    hook.remove()
    with torch.autograd.graph.save_on_cpu():
        assert not is_deferred(patched)
    parameters = dict(patched.named_parameters())
    of_function = torch.func.functional_call
    torch.func.grad(lambda p: of_function(patched, p, (IDS, LABELS))[0])(parameters)
    assert type(torch.compile(patched, backend="aot_eager", fullgraph=True)(IDS)) is Tensor
    torch.export.export(patched, (IDS,))
    monkeypatch.setattr(deferred, "LEAST", IDS.numel() * C + 1)
    assert not is_deferred(patched)
    monkeypatch.undo()
    monkeypatch.setattr(deferred, "LEAST", 1)
    assert is_deferred(patched)
    assert not is_deferred(unpatch(patched))
    assert type(patched.head) is torch.nn.Linear


def test_below_torchs_functions_a_gradient_arrives_too() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            return logits * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 2

    steps: Any = [lambda y: y, Tensor.float, lambda y: y / 3, lambda y: (y / 3).tanh()]
    for step in (*steps, lambda y: (y / 3).tanh() * 3):
        model, patched = twins()
        for m in (model, patched):
            Twice.apply(step(m(IDS))).square().sum().backward()
        for a, b in zip(gradients(patched), gradients(model), strict=True):
            torch.testing.assert_close(a, b)


def test_the_loss_of_functional() -> None:
    _, patched = twins()
    logits = patched(IDS)
    functional.cross_entropy(logits.view(-1, C), LABELS.view(-1))
    assert not logits.is_made()
