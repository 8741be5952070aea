"""Optimizers: torch.optim's numbers, checkpoints, errors and manners, on every backend."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import custom_backprop
from custom_backprop import optim
from custom_backprop.backends.kernels import kernels
from custom_backprop.formulas import optim as formulas
from custom_backprop.nn.utils import clip_grad_norm_, clip_weights_
from custom_backprop.optim import bucket as buckets
from custom_backprop.optim.guards import guard
from custom_backprop.optim.lion import _Loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    custom_backprop.backends.why_not("triton", DEVICE) is not None, reason="no kernels here"
)
#: awkward: no element, one, a scalar, an odd few, rows, another order of memory, more than one
#: block and more than one piece
SHAPES = [(0,), (1,), (), (7,), (3, 5), (2, 3, 2, 2), (150,)]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    (
        "Adagrad",
        {
            "lr": 0.1,
            "lr_decay": 0.01,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.5,
            "eps": 1e-3,
            "maximize": True,
        },
    ),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5}),
    ("RMSprop", {"lr": 0.01, "eps": 1e-2, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "eps": 1e-2, "centered": True, "momentum": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adam", {"lr": 0.01, "betas": (0.0, 0.9)}),
    ("AdamW", {"lr": 0.01}),
    (
        "AdamW",
        {
            "lr": 0.01,
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 0.3,
            "amsgrad": True,
            "maximize": True,
        },
    ),
    ("Lion", {"lr": 0.01}),
    ("Lion", {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 0.3, "maximize": True}),
]
NAMES = list(dict.fromkeys(name for name, _ in OPTIONS))
#: one set of options of each that has every state
FULL = dict(OPTIONS)
every_option = pytest.mark.parametrize(
    ("name", "kwargs"), OPTIONS, ids=[f"{n}-{'-'.join(list(k)[1:])}" for n, k in OPTIONS]
)
every_optimizer = pytest.mark.parametrize("name", NAMES)


def stock(name: str) -> Any:
    return _Loop if name == "Lion" else getattr(torch.optim, name)


def ours(name: str) -> Any:
    return getattr(optim, name)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and pieces so small that these tensors take several."""
    if (
        custom_backprop.backends.why_not("triton", "cuda" if torch.cuda.is_available() else "cpu")
        is None
    ):
        monkeypatch.setattr(kernels("optim"), "BLOCK", 32)
        monkeypatch.setattr(kernels("optim"), "ROUNDS", 2)
    monkeypatch.setattr(buckets, "PIECE", 64)  # whole vectors, as the true size


def parameters(
    device: str = "cpu", dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes
    ]
    return [
        Parameter(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        for t in made
    ]


def give_gradients(params: list[Parameter], step: int, skip: bool = True) -> None:
    """Gradients that depend on the parameters; now and then one has none."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
        p.grad = (
            None
            if skip and (step + i) % 11 == 3
            else torch.empty_like(p).copy_(p.detach().sin() + noise)
        )


def train(optimizer: Any, params: list[Parameter], steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        give_gradients(params, step)
        optimizer.step()


def assert_equal(mine: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Parameters or optimizers' states agree."""
    if isinstance(mine, Tensor):
        mine, theirs = mine.detach(), theirs.detach()
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        scale = (
            theirs.nan_to_num(posinf=1, neginf=1).abs().max().clamp_min(1) if theirs.numel() else 1
        )
        assert torch.allclose(
            mine, theirs.to(mine.device), rtol=0, atol=float(tolerance * scale), equal_nan=True
        )
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key], tolerance)
    elif isinstance(mine, (list, tuple)):
        for a, b in zip(mine, theirs, strict=True):
            assert_equal(a, b, tolerance)
    else:
        assert mine == theirs


@every_option
def test_a_hundred_steps_are_torchs(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    shapes = (
        [(5,)] if backend == "triton" and device == "cpu" else SHAPES
    )  # the interpreter is slow; more blocks below
    mine, theirs = parameters(device, shapes=shapes), parameters(device, shapes=shapes)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    train(our, mine, 100)
    train(their, theirs, 100)
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@every_option
def test_awkward_shapes(name: str, kwargs: dict[str, Any], backend: str, device: str) -> None:
    mine, theirs = parameters(device), parameters(device)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    train(our, mine, range(1, 3))  # the first without a gradient for one of them
    train(their, theirs, range(1, 3))
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "kwargs", [k for n, k in OPTIONS if n == "SGD"], ids=lambda k: "-".join(list(k)[1:])
)
def test_sgd_gives_the_bits_of_torchs_loop(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    mine, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    train(optim.SGD(mine, fused=False, **kwargs), mine, 7)
    train(torch.optim.SGD(theirs, foreach=False, **kwargs), theirs, 7)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "kwargs", [k for n, k in OPTIONS if n == "SGD"], ids=lambda k: "-".join(list(k)[1:])
)
def test_sgd_gives_the_bits_of_torchs_fused_kernel(
    kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    shapes = [(5, 3), (1000,)]
    mine, theirs = parameters(dtype=dtype, shapes=shapes), parameters(dtype=dtype, shapes=shapes)
    train(optim.SGD(mine, **kwargs), mine, 7)
    train(torch.optim.SGD(theirs, fused=True, **kwargs), theirs, 7)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@every_optimizer
def test_a_checkpoint_moves_both_ways(name: str, backend: str, device: str) -> None:
    kwargs, shapes = FULL[name], [(7,)]
    runs = []
    for first, second in (
        (ours(name), stock(name)),
        (stock(name), ours(name)),
        (stock(name), stock(name)),
    ):
        params = parameters(device, shapes=shapes)
        before = first(params, **kwargs)
        train(before, params, 2)
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = second(params, lr=1e9)
        after.load_state_dict(torch.load(file))
        train(after, params, range(4, 6))
        runs.append((params, after.state_dict()))
    assert_equal(runs[0], runs[2])
    assert_equal(runs[1], runs[2])


@every_optimizer
def test_two_optimizers_loaded_from_one_state_do_not_share_it(name: str) -> None:
    params = parameters()
    source = ours(name)(params, **FULL[name])
    train(source, params, 3)
    loaded = ours(name)(parameters(), **FULL[name])
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    before = copy.deepcopy(loaded.state_dict())
    train(source, params, range(3, 5))
    assert_equal(loaded.state_dict(), before)


@every_optimizer
def test_pickle_and_deepcopy(name: str) -> None:
    params = parameters()
    optimizer = ours(name)(params, max_grad_norm=0.5, **FULL[name])
    train(optimizer, params, 3)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert twin.max_grad_norm == 0.5
        assert_equal(twin.state_dict(), optimizer.state_dict())
        its = twin.param_groups[0]["params"]
        mine = [Parameter(p.detach().clone()) for p in params]
        other = ours(name)(mine, max_grad_norm=0.5, **FULL[name])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(twin, its, range(3, 6))
        train(other, mine, range(3, 6))
        assert_equal(its, mine)


def makes_state_anew(name: str) -> bool:
    """torch 2.11's Adagrad makes state in its constructor alone."""
    params = parameters()
    optimizer = stock(name)(params, **FULL[name])
    optimizer.state.clear()
    try:
        train(optimizer, params, 1)
    except KeyError:
        return False
    return True


@every_optimizer
def test_state_taken_away_replaced_or_cleared_is_noticed(name: str) -> None:
    mine, theirs = parameters(), parameters()
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    without_state = nullcontext() if makes_state_anew(name) else pytest.raises(KeyError)
    for part in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            for step in range(3):
                give_gradients(params, 3 * part + step, skip=False)
                with without_state if part > 1 else nullcontext():
                    optimizer.step()
            if part == 0:  # one state tensor replaced
                key = next(k for k in optimizer.state[params[3]] if k != "step")
                optimizer.state[params[3]][key] = torch.full_like(params[3], 0.5)
            elif part == 1:  # all state of one parameter forgotten
                optimizer.state[params[4]] = {}
            else:
                optimizer.state.clear()
    assert_equal(mine, theirs)


@every_optimizer
def test_parameters_and_gradients_may_change_place_and_strides(name: str) -> None:
    """``p.data = ...``, gradients kept in place, transposed ones (which torch's fused kernels
    misread), a group losing a member."""
    mine, theirs = (
        parameters(shapes=[(4, 6), (5,), (30,)]),
        parameters(shapes=[(4, 6), (5,), (30,)]),
    )
    loop = {} if name == "Lion" else {"foreach": False}
    fused = {"fused": True} if name in ("SGD", "Adagrad", "Adam", "AdamW") else {}
    our, their = ours(name)(mine, **fused, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(8):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step == 2:
                params[2].data = params[2].data.clone()
            if step in (3, 4):
                params[0].grad = params[0].grad.t().contiguous().t()
            if step == 6:
                optimizer.param_groups[0]["params"].pop()
            optimizer.step()
            if step == 0:
                optimizer.zero_grad(set_to_none=False)
    assert_equal(mine, theirs)


@every_optimizer
def test_of_a_size_of_1_any_stride_is_as_good_as_another(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = parameters(shapes=[(5, 1), (4,)]), parameters(shapes=[(5, 1), (4,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    monkeypatch.delattr(optim.optimizer.MultiTensor, "_by_torch")
    for step in range(5):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step != 2:
                params[0].grad = params[0].grad.view(1, 5).t()
                assert params[0].grad.stride() != params[0].stride()
            optimizer.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_gradients_stored_negated(name: str, backend: str, device: str) -> None:
    """As ``z.conj().imag`` is: the sign is a bit of the tensor."""
    mine, theirs = parameters(device, shapes=[(5,)]), parameters(device, shapes=[(5,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(5):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step > 2:
                params[0].grad = torch._neg_view(params[0].grad.neg())
            optimizer.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_a_parameter_goes_to_another_place_and_back(name: str) -> None:
    """What is kept by address is made, for the clipping, while it is away."""
    (mine,), (theirs,) = parameters(shapes=[(5,)]), parameters(shapes=[(5,)])
    our, their = ours(name)([mine], **FULL[name]), stock(name)([theirs], **FULL[name])
    home, other = mine.data, mine.data.clone()
    for step in range(9):
        if step == 3:
            mine.data = other.copy_(home)
        elif step == 6:
            mine.data = home.copy_(other)
        our.max_grad_norm = 0.5 if step > 4 else None
        give_gradients([mine], step, skip=False)
        give_gradients([theirs], step, skip=False)
        our.step()
        if step > 4:
            clip_grad_norm_([theirs], 0.5)
        their.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_gradients_that_come_and_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pattern is planned once, and no state moves for it: to plan takes longer than many
    steps."""
    planned: list[int] = []
    plan = optim.optimizer.MultiTensor._planned
    monkeypatch.setattr(
        optim.optimizer.MultiTensor,
        "_planned",
        lambda self, group: planned.append(1) or plan(self, group),
    )
    mine, theirs = parameters(shapes=[(3, 2)] * 40), parameters(shapes=[(3, 2)] * 40)
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(24):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            if step % 3:
                params[20 + step % 3].grad = None
            optimizer.step()
    assert_equal(mine, theirs)
    assert len(planned) == 3


@every_optimizer
def test_a_parameter_of_another_shape_at_the_same_address(name: str) -> None:
    """Transposed it is updated as torch does; cut, its old state does not fit, and nothing beyond
    it is read."""
    mine, theirs = parameters(shapes=[(4, 4)]), parameters(shapes=[(4, 4)])
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **loop, **FULL[name])
    for step in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            if step == 2:
                params[0].data = params[0].data.t()
            give_gradients(params, step, skip=False)
            params[0].grad = params[0].grad.contiguous()
            optimizer.step()
    assert_equal(mine, theirs)
    for optimizer, params in ((our, mine), (their, theirs)):
        params[0].data = params[0].data[:2]
        params[0].grad = torch.ones(2, 4, dtype=params[0].dtype)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time that a bucket looks at its gradients in Python."""
    seen: list[int] = []
    look = buckets.Bucket._looked_at
    monkeypatch.setattr(
        buckets.Bucket, "_looked_at", lambda self, grads: seen.append(1) or look(self, grads)
    )
    return seen


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "no guards"])
@every_optimizer
def test_the_look_at_the_gradients_is_torchs_own_from_the_third_step_on(
    name: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a change of autocast or inference mode is looked at in Python, for each of two orders
    of memory; the update is the same."""
    if not guarded:
        monkeypatch.setattr(buckets, "guard", lambda tensors: None)
    seen = looks(monkeypatch)
    mine, theirs = parameters(), parameters()
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
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


@every_optimizer
def test_two_parameters_of_one_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own look never says yes to them: it is asked once."""
    made: list[int] = []
    monkeypatch.setattr(buckets, "guard", lambda tensors: made.append(1) or guard(tensors))
    mine, theirs = parameters(shapes=[(5,), (5,)]), parameters(shapes=[(5,), (5,)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(6):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(params, step, skip=False)
            params[1].grad = params[0].grad
            optimizer.step()
    assert_equal(mine, theirs)
    assert len(made) == 1


def test_flags_changed_on_the_way(backend: str, device: str) -> None:
    """Which a compiled kernel has built in."""
    mine, theirs = parameters(device, shapes=[(5,)]), parameters(device, shapes=[(5,)])
    our, their = (
        kind(p, lr=0.1, momentum=0.9) for kind, p in ((optim.SGD, mine), (torch.optim.SGD, theirs))
    )
    for step in range(8):
        for optimizer, params in ((our, mine), (their, theirs)):
            optimizer.param_groups[0].update(
                maximize=bool(step & 1), nesterov=bool(step & 2), weight_decay=0.1 * (step & 4)
            )
            give_gradients(params, step, skip=False)
            optimizer.step()
    assert_equal(mine, theirs)


@needs_kernels
def test_a_gradient_at_an_odd_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is seen as such, while it is there: the kernel would read 16 bytes at once. Addresses that
    have not changed are not sent again."""
    params, home = [torch.zeros(8, device=DEVICE) for _ in range(2)], torch.zeros(17, device=DEVICE)
    even, odd = [home[:8], home[8:16]], [home[:8], home[9:]]
    table = kernels("optim").Table(params, [None, None, None], None)
    sent: list[Any] = []
    monkeypatch.setattr(
        table,
        "_sent",
        lambda *args: sent.append(args) or kernels("optim").Table._sent(table, *args),
    )
    assert [table.see(grads) for grads in (even, even, odd, odd, even)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert len(sent) == 3
    assert table.table[3].tolist() == [t.data_ptr() for t in even]
    assert not kernels("optim").Table([home[1:9], params[0]], [None, None, None], None).see(even)


ANOTHER: dict[str, Any] = {
    "strides": lambda p: p.data.t().contiguous().t(),
    "address": lambda p: p.data.clone(),
    "shape": lambda p: p.data.view(6, 4),
    "size": lambda p: p.data[:2].clone(),
    "storage": lambda p: p.data.view(4, 6)[:2],
    "dtype": lambda p: p.data.float(),
}


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "no guards"])
@pytest.mark.parametrize("what", ANOTHER)
@pytest.mark.parametrize("of", ["parameter", "gradient"])
@every_optimizer
def test_data_replaced_under_a_parameter_or_its_gradient(
    name: str, of: str, what: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``.data = ...`` leaves no trace but the tensor itself. Where torch fails, so do we, at the
    same step."""
    if not guarded:
        monkeypatch.setattr(buckets, "guard", lambda tensors: None)
    loop = {} if name == "Lion" else {"foreach": False}
    results = []
    for kind, more in ((ours(name), {}), (stock(name), loop)):
        params = parameters(shapes=[(5,), (4, 6), (7,)])
        optimizer = kind(params, **FULL[name], **more)
        for step in range(4):
            give_gradients(params, step, skip=False)
            optimizer.step()
        for step in range(4, 8):
            give_gradients(params, step, skip=False)
            tensor = params[1] if of == "parameter" else params[1].grad
            tensor.data = ANOTHER[what](tensor)
            with suppress(RuntimeError):
                optimizer.step()
                if step < 7:
                    continue
            break
        results.append([p.detach().double() for p in params] if step == 7 else step)
    assert_equal(results[0], results[1], 1e-12 if what != "dtype" else 1e-6)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("SGD", {"momentum": 0.0}, {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
        ("Adam", {"amsgrad": True}, {"amsgrad": False}),
        ("RMSprop", {"momentum": 0.5, "centered": True}, {"momentum": 0.0, "centered": False}),
        ("AdamW", {"betas": (0.9, 0.99)}, {"betas": [0.5, 0.9]}),
        ("Lion", {"betas": (0.9, 0.99)}, {"betas": [0.5, 0.9]}),
    ],
)
def test_hyperparameters_changed_on_the_way(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Those that decide which state there is, and what a JSON file makes of a pair."""
    mine, theirs = parameters(), parameters()
    loop = {} if name == "Lion" else {"foreach": False}
    our, their = ours(name)(mine, lr=0.01, **before), stock(name)(theirs, lr=0.01, **loop, **before)
    for step in range(6):
        for optimizer, params in ((our, mine), (their, theirs)):
            if step == 3:
                optimizer.param_groups[0].update(after)
            give_gradients(params, step)
            optimizer.step()
    assert_equal(mine, theirs)


@every_optimizer
def test_the_default_device_has_no_part(name: str, backend: str, device: str) -> None:
    mine, theirs = parameters(device), parameters(device)
    for params, where in ((mine, "meta"), (theirs, device)):
        optimizer = ours(name)(params, max_grad_norm=1.0, **FULL[name])
        for step in range(3):
            give_gradients(params, step)
            with torch.device(where):
                optimizer.step()
    assert_equal(mine, theirs, 0.0)


@every_optimizer
def test_nor_where_torch_updates(name: str) -> None:
    """As it does with a gradient of other strides."""
    mine, theirs = parameters(shapes=[(4, 6)]), parameters(shapes=[(4, 6)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for step in range(3):
        for optimizer, params, where in ((our, mine, "meta"), (their, theirs, "cpu")):
            give_gradients(params, step, skip=False)
            params[0].grad = params[0].grad.t().contiguous().t()
            with torch.device(where):
                optimizer.step()
    assert_equal(mine, theirs)
    assert_equal(our.state_dict(), their.state_dict())


@every_optimizer
def test_groups_schedulers_hooks_and_closures(name: str) -> None:
    def run(kind: Any) -> tuple[list[Parameter], list[float]]:
        params = parameters()
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05, "weight_decay": 0.01}]
        optimizer = kind(groups, **FULL[name])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [0.1, 0.2], total_steps=10, cycle_momentum=False
        )
        seen: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(-1.0))
        optimizer.register_step_post_hook(lambda *_: seen.append(-2.0))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - 0.3) ** 2).sum() for p in params)
            assert isinstance(loss, Tensor)
            loss.backward()
            return loss

        for _ in range(9):
            seen.append(float(optimizer.step(closure).detach()))
            scheduler.step()
        optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.float64))]})
        optimizer.step(closure)
        return params, seen

    mine, theirs = run(ours(name)), run(stock(name))
    assert mine[1] == pytest.approx(theirs[1], abs=1e-12)
    assert_equal(mine[0], theirs[0])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, *([] if DEVICE == "cuda" else [torch.bfloat16])],
    ids=str,
)
@every_optimizer
def test_grad_scaler_and_an_infinity(
    name: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A step of scaled gradients is that of the gradients; a step with an infinity leaves
    parameters and state alone."""
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))
    mine, theirs = parameters(device, dtype, [(5,)]), parameters(device, dtype, [(5,)])
    our, their = ours(name)(mine, **FULL[name]), ours(name)(theirs, **FULL[name])
    for step in range(4):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        if step == 2:
            mine[0].grad[1] = math.inf  # type: ignore[index]
            before = copy.deepcopy((mine, our.state_dict()["state"]))
        for p in mine:
            p.grad = p.grad * scaler.get_scale()
        scaler.step(our)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 512.0
            assert_equal((mine, our.state_dict()["state"]), before, 0.0)
        else:
            their.step()
    assert not hasattr(our, "grad_scale")
    assert_equal(mine, theirs, 0.0 if dtype != torch.float32 else 1e-6)


@pytest.mark.skipif(DEVICE != "cuda", reason="asks a GPU")
def test_on_a_gpu_torch_scales_no_bfloat16_gradients() -> None:
    """pytorch issue 127176. Once it does, the test above can ask for them there too."""
    with pytest.raises(NotImplementedError, match="BFloat16"):
        torch._amp_foreach_non_finite_check_and_unscale_(
            [torch.ones(1, dtype=torch.bfloat16, device=DEVICE)],
            torch.zeros(1, device=DEVICE),
            torch.ones(1, device=DEVICE),
        )


@every_optimizer
def test_a_bucket_on_a_cpu_reads_the_infinity_that_a_gpu_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels read it themselves, but parameters may lie on both."""
    monkeypatch.setattr(optim.optimizer.MultiTensor, "_reads", lambda self, found: False)
    params = parameters()
    optimizer = ours(name)(params, **FULL[name])
    give_gradients(params, 1)
    optimizer.found_inf = torch.ones(())
    before = copy.deepcopy(params)
    optimizer.step()
    assert_equal(params, before, 0.0)
    del optimizer.found_inf
    theirs = parameters()
    give_gradients(theirs, 1)
    optimizer.step()
    stock(name)(theirs, **FULL[name]).step()
    assert_equal(params, theirs)


@every_optimizer
def test_grad_scaler_after_unscale(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    mine, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    our, their = (
        ours(name)(mine, max_grad_norm=0.1, **FULL[name]),
        ours(name)(theirs, max_grad_norm=0.1, **FULL[name]),
    )
    for step in range(3):
        give_gradients(mine, step, skip=False)
        give_gradients(theirs, step, skip=False)
        for p in mine:
            p.grad = p.grad * 8
        if step != 1:
            scaler.unscale_(our)
        scaler.step(our)
        scaler.update()
        their.step()
    assert_equal(mine, theirs, 1e-6)


@pytest.mark.parametrize("norm", [0.0, 0.7, 1e6])
@every_optimizer
def test_max_grad_norm_is_clip_grad_norm_before_the_step(
    name: str, norm: float, backend: str, device: str
) -> None:
    mine, theirs = (
        parameters(device, shapes=[(5,), (2, 3)]),
        parameters(device, shapes=[(5,), (2, 3)]),
    )
    our, their = (
        ours(name)(mine, max_grad_norm=norm, **FULL[name]),
        stock(name)(theirs, **FULL[name]),
    )
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        before = copy.deepcopy([p.grad for p in mine])
        our.step()
        for p, g in zip(mine, before, strict=True):
            assert p.grad is g is None or torch.equal(p.grad, g)
        clip_grad_norm_(theirs, norm)
        their.step()
    assert_equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name: str) -> None:
    def run(kind: Any, **extra: Any) -> list[Parameter]:
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(9, 4, sparse=True, dtype=torch.float64)
        dense = Parameter(torch.ones(4, dtype=torch.float64))
        params = [embedding.weight, dense]
        optimizer = kind(params, lr=0.1, **extra)
        for step in range(5):
            optimizer.zero_grad()
            ((embedding(torch.tensor([step, 3, 3])) * dense) ** 2).sum().backward()
            if not extra and kind is stock(name) and clip:
                total = torch.linalg.vector_norm(
                    torch.cat([embedding.weight.grad.coalesce().values().flatten(), dense.grad])
                )
                for p in params:
                    p.grad = p.grad * min(1.0, float(clip / (total + 1e-6)))
            optimizer.step()
        return params

    clip = 0.0
    assert_equal(run(ours(name)), run(stock(name)))
    clip = 0.5
    assert_equal(run(ours(name), max_grad_norm=clip), run(stock(name)))


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW", "Lion"])
def test_sparse_gradients_are_refused_where_torch_refuses(name: str) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours(name)([p]).step()


@every_optimizer
def test_complex_and_real_parameters_together(name: str) -> None:
    def run(kind: Any, **extra: Any) -> list[Parameter]:
        generator = torch.Generator().manual_seed(3)
        params = [
            Parameter(torch.randn(4, dtype=d, generator=generator))
            for d in (torch.complex128, torch.float64, torch.complex128)
        ]
        optimizer = kind(params, **FULL[name], **extra)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(4, dtype=p.dtype, generator=generator)
            if clip:
                clip_grad_norm_(params, clip)
            optimizer.step()
        return params

    clip = 0.0
    assert_equal(run(ours(name)), run(stock(name)))
    clip = 0.4
    reference = run(stock(name))
    clip = 0.0
    assert_equal(run(ours(name), max_grad_norm=0.4), reference)


@every_optimizer
def test_a_learning_rate_may_be_a_tensor(name: str) -> None:
    mine, theirs = parameters(), parameters()
    our, their = (
        kind(params, **{**FULL[name], "lr": torch.tensor(0.01, dtype=torch.float64)})
        for kind, params in ((ours(name), mine), (stock(name), theirs))
    )
    for optimizer, params in ((our, mine), (their, theirs)):
        train(optimizer, params, 3)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        train(optimizer, params, range(3, 6))
    assert_equal(mine, theirs)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "Lion"])
def test_flags_of_torchs_variants_are_accepted(name: str, flag: str) -> None:
    if name == "RMSprop" and flag == "fused":
        with pytest.raises(TypeError):
            optim.RMSprop(parameters(), fused=True)  # type: ignore[call-arg]
        return
    kwargs = {**FULL[name], flag: True}
    mine, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    our, their = ours(name)(mine, **kwargs), stock(name)(theirs, **kwargs)
    for step in range(4):
        for optimizer, params in ((our, mine), (their, theirs)):
            give_gradients(
                params, step, skip=False
            )  # torch's fused SGD fails on a gradient that is absent at the first step only
            optimizer.step()
    assert_equal(mine, theirs, 1e-6)
    assert our.state_dict()["param_groups"] == their.state_dict()["param_groups"]


@every_optimizer
def test_differentiable(name: str) -> None:
    """Autograd goes through the step to what the gradient was made of."""

    def run(kind: Any) -> Tensor:
        start = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.01, weight_decay=0.1, differentiable=True)
        p.grad = (start * 3).detach() if name == "Adagrad" else start * 3
        optimizer.step()
        (p * p).sum().backward()
        assert start.grad is not None
        return start.grad

    assert_equal(run(ours(name)), run(stock(name)))
    with pytest.raises(ValueError, match="differentiable"):
        ours(name)(parameters(), differentiable=True, max_grad_norm=1.0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_is_torchs_own(name: str) -> None:
    """On a CPU torch refuses it, when it steps."""
    for kind in (ours(name), stock(name)):
        params = parameters(shapes=[(3,)])
        optimizer = kind(params, capturable=True)
        give_gradients(params, 0)
        with pytest.raises(AssertionError, match="capturable"):
            optimizer.step()


@every_optimizer
def test_compiled(name: str) -> None:
    mine, theirs = parameters(shapes=[(5,), (2, 3)]), parameters(shapes=[(5,), (2, 3)])
    our, their = ours(name)(mine, **FULL[name]), stock(name)(theirs, **FULL[name])
    for optimizer, params in ((our, mine), (their, theirs)):
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager")
        for i in range(3):
            give_gradients(params, i, skip=False)
            step()
    assert_equal(mine, theirs)


def test_compiled_with_an_argument_of_ours() -> None:
    mine, theirs = parameters(shapes=[(5,)]), parameters(shapes=[(5,)])
    our, their = (
        optim.SGD(mine, lr=0.1, max_grad_norm=0.5),
        optim.SGD(theirs, lr=0.1, max_grad_norm=0.5),
    )
    torch._dynamo.reset()
    step = torch.compile(our.step, backend="aot_eager")
    for i in range(2):
        give_gradients(mine, i)
        give_gradients(theirs, i)
        step()
        their.step()
    assert_equal(mine, theirs)


BAD: list[tuple[str, dict[str, Any]]] = [
    *((n, {"lr": -1.0}) for n in NAMES),
    *((n, {"weight_decay": -1.0}) for n in NAMES),
    *((n, {"lr": torch.ones(2)}) for n in NAMES),
    *((n, {"unknown": 1}) for n in NAMES),
    *((n, {"betas": b}) for n in ("Adam", "AdamW", "Lion") for b in ((1.0, 0.9), (0.9, -0.1))),
    *((n, {"eps": -1.0}) for n in ("Adagrad", "RMSprop", "Adam", "AdamW")),
    *((n, {"fused": True, "foreach": True}) for n in ("SGD", "Adagrad", "Adam", "AdamW")),
    ("SGD", {"momentum": -0.1}),
    ("SGD", {"nesterov": True}),
    ("Adagrad", {"lr_decay": -1.0}),
    ("RMSprop", {"alpha": -1.0}),
]


@pytest.mark.parametrize(("name", "kwargs"), BAD)
def test_bad_arguments_raise_as_torchs(name: str, kwargs: dict[str, Any]) -> None:
    errors = []
    for kind in (ours(name), stock(name)):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            kind(parameters(), **kwargs)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@every_optimizer
def test_bad_parameters_raise_as_torchs(name: str) -> None:
    leaf = torch.ones(2, requires_grad=True)
    for params in (
        [],
        torch.ones(2),
        [leaf * 2],
        ["p"],
        [{"params": {leaf}}],
        [{"params": [leaf]}, {"params": [leaf]}],
    ):
        errors = []
        for kind in (ours(name), stock(name)):
            with pytest.raises((ValueError, TypeError)) as caught:
                kind(params)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@every_optimizer
def test_own_arguments(name: str) -> None:
    for kwargs in (
        {"max_grad_norm": -1.0},
        {"max_grad_norm": math.nan},
        {"master_weights": True, "bf16_stochastic_round": True},
    ):
        with pytest.raises(ValueError, match=r"max_grad_norm|choose one"):
            ours(name)(parameters(), **kwargs)
    taken = inspect.signature(ours(name)).parameters
    assert list(taken)[:-3] == list(inspect.signature(stock(name)).parameters)
    assert list(taken)[-3:] == ["max_grad_norm", "master_weights", "bf16_stochastic_round"]
    assert issubclass(ours(name), stock(name))


@every_optimizer
def test_no_gradient_at_all(name: str) -> None:
    params = parameters()
    before = copy.deepcopy(params)
    ours(name)(params, max_grad_norm=1.0).step()
    assert_equal(params, before, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_optimizer
def test_master_weights(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Half-precision parameters follow a float32 run on the same gradients, and so after a
    checkpoint."""
    shapes = [(5,), (2, 3)]
    half, full = (
        parameters(device, dtype, shapes),
        [Parameter(p.detach().float()) for p in parameters(device, dtype, shapes)],
    )
    our, their = (
        ours(name)(half, master_weights=True, **FULL[name]),
        stock(name)(full, **FULL[name]),
    )
    for step in range(4):
        give_gradients(half, step)
        for p, q in zip(half, full, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        our.step()
        their.step()
        for p, q in zip(half, full, strict=True):
            assert_equal(our.state[p]["master_param"], q.detach(), 1e-5)
            assert torch.equal(p, our.state[p]["master_param"].to(dtype))
        if step == 1:
            saved = copy.deepcopy(our.state_dict())
            our = ours(name)(half, master_weights=True, **FULL[name])
            our.load_state_dict(saved)
            assert_equal(our.state_dict(), saved, 0.0)


def test_masters_follow_what_others_write(backend: str, device: str) -> None:
    """Weight clipping after each step, and a model loaded anew: the next step starts from there."""
    (p,) = parameters(device, torch.bfloat16, [(5,)])
    optimizer = ours("SGD")([p], lr=1.0, master_weights=True)
    for _ in range(4):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        clip_weights_(p, 0.5)
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[p]["master_param"], torch.full((5,), 1.5, device=device)
    )
    with torch.no_grad():
        p[2] = 8.0
    p.data = p.data.clone()
    optimizer.step()
    expected = torch.full((5,), 2.5, device=device)
    expected[2] = 9.0
    torch.testing.assert_close(optimizer.state[p]["master_param"], expected)
    torch.testing.assert_close(p.detach(), expected.bfloat16())


@every_optimizer
def test_stochastic_rounding_keeps_updates_too_small_for_bfloat16(
    name: str, backend: str, device: str
) -> None:
    """Many parameters of 1 pulled down by far less than a spacing: all of them stay when rounded to
    nearest, on average none does."""
    n, steps = (4096, 4) if backend != "triton" or device != "cpu" else (64, 4)
    kwargs: dict[str, Any] = (
        {"lr": 2.0**-11}
        if name != "Adagrad"
        else {"lr": 2.0**-11, "initial_accumulator_value": 1.0}
    )
    mine, exact = (
        Parameter(torch.ones(n, dtype=torch.bfloat16, device=device)),
        Parameter(torch.ones(1, device=device)),
    )
    our, their = (
        ours(name)([mine], bf16_stochastic_round=True, **kwargs),
        stock(name)([exact], **kwargs),
    )
    for _ in range(steps):
        mine.grad, exact.grad = torch.ones_like(mine), torch.ones_like(exact)
        our.step()
        their.step()
    # below 1 a spacing is 2**-8: after k roundings the mean of n is off by at most sqrt(k / (4 n))
    # spacings (one standard deviation)
    bound = 5 * 2.0**-8 * math.sqrt(steps / (4 * n))
    assert abs(mine.detach().double().mean().item() - exact.item()) < bound
    assert 1 - exact.item() > bound or backend == "triton"
    assert all(s.dtype == torch.float32 for k, s in our.state[mine].items())


WIDE: list[dict[str, Any]] = [{"master_weights": True}, {"bf16_stochastic_round": True}]


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@every_optimizer
def test_gradients_and_states_in_another_order_of_memory(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """A transposed gradient, and a checkpoint of a model in another memory format, are what they
    are by index."""

    def run(transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        (p,) = parameters(device, torch.bfloat16, [(4, 6)])
        optimizer = ours(name)([p], **kwargs, **FULL[name])
        for step in range(6):
            give_gradients([p], step, skip=False)
            if transposed and step != 4:
                p.grad = p.grad.t().contiguous().t()
            optimizer.step()
            if transposed and step == 2:
                for key, state in optimizer.state[p].items():
                    optimizer.state[p][key] = (
                        state.t().contiguous().t() if state.dim() == 2 else state
                    )
        return p.detach(), optimizer.state[p]

    (mine, states), (theirs, others) = run(True), run(False)
    assert_equal(states, others, 1e-6 if "master_weights" in kwargs else 1e-2)
    assert_equal(mine, theirs, 1e-6 if "master_weights" in kwargs else 1e-2)
    assert {s.dtype for s in states.values()} == {torch.float32}


class _Kind(Parameter):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "capturable": (lambda p: p, "capturable"),
    "sparse": (lambda p: p, "dense"),
    "subclass": (lambda p: _Kind(p.detach()), "_Kind"),
    "apart": (lambda p: Parameter(torch.zeros(6, 8, dtype=p.dtype)[:, ::2]), "apart"),
    "shape": (lambda p: p, "shape"),
}


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@pytest.mark.parametrize(
    ("name", "what"),
    [
        (n, w)
        for n in NAMES
        for w in REFUSED
        if w != "capturable" or n in ("RMSprop", "Adam", "AdamW")
    ],
)
def test_what_torchs_own_update_would_leave_out_is_refused(
    name: str, what: str, kwargs: dict[str, Any]
) -> None:
    (p,), (make, match) = parameters(dtype=torch.bfloat16, shapes=[(6, 4)]), REFUSED[what]
    p = make(p)
    optimizer = ours(name)(
        [p], **kwargs, **FULL[name], **({"capturable": True} if what == "capturable" else {})
    )
    p.grad = torch.ones_like(p)
    if what == "sparse":
        p.grad = p.grad.to_sparse()
        if name not in ("SGD", "Adagrad"):
            match = "does not support sparse gradients"  # torch's own
    elif what == "shape":
        p.grad.data = torch.ones(4, 6, dtype=p.dtype)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert torch.equal(p, before)
    full = Parameter(p.detach().float())  # of what is asked for, a float32 parameter needs nothing
    full.grad = torch.ones_like(full)
    if what != "capturable":
        ours(name)([full], **kwargs, **FULL[name]).step()


@pytest.mark.parametrize("kwargs", WIDE, ids=lambda k: next(iter(k)))
@every_optimizer
def test_hyperparameters_out_of_a_graph(
    name: str, kwargs: dict[str, Any], backend: str, device: str
) -> None:
    """Read as the numbers they are, on whatever device."""

    def run(lr: Any) -> Tensor:
        torch.manual_seed(0)
        (p,) = parameters(device, torch.bfloat16, [(5,)])
        optimizer = ours(name)([p], **{**FULL[name], "lr": lr}, **kwargs)
        train(optimizer, [p], 3)
        assert all(s.dtype == torch.float32 for s in optimizer.state[p].values())
        return p.detach()

    assert_equal(run(torch.tensor(0.25, device=device, requires_grad=True)), run(0.25), 0.0)


def test_where_aten_has_no_update_of_ours_the_formula_keeps_masters() -> None:
    """On a device that is no CPU; here none at all."""
    p = Parameter(torch.empty(3, dtype=torch.bfloat16, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, master_weights=True)
    with custom_backprop.use_backend("aten"):
        optimizer.step()
    assert {name: s.dtype for name, s in optimizer.state[p].items()} == dict.fromkeys(
        ("momentum_buffer", "master_param"), torch.float32
    )


def test_stochastic_rounding_is_unbiased_and_leaves_what_bfloat16_can_hold(
    backend: str, device: str
) -> None:
    special = torch.tensor(
        [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, math.nan, 2.0**-133], dtype=torch.float32
    )
    noise = torch.tensor([0xFFFF] * len(special), dtype=torch.int32)
    assert_equal(formulas.stochastically_rounded(special, noise), special.bfloat16(), 0.0)
    x = torch.full((20000,), 1 + 0.3 * 2.0**-7)  # three tenths of the way to the next
    rounded = formulas.stochastically_rounded(x, torch.randint(2**16, x.shape, dtype=torch.int32))
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    up = (rounded > 1).double().mean().item()
    assert abs(up - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(x))


def test_stochastic_rounding_follows_the_seed(backend: str, device: str) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        p = Parameter(torch.ones(50, dtype=torch.bfloat16, device=device))
        optimizer = optim.SGD([p], lr=2.0**-9, bf16_stochastic_round=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        destroy_process_group()


@every_optimizer
def test_dtensor_parameters(name: str, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def run(kind: Any, **extra: Any) -> list[Tensor]:
        params = [
            Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            for p in parameters(shapes=[(6, 2), (5,)])
        ]
        optimizer = kind(params, **FULL[name], **extra)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = distribute_tensor(
                    torch.randn(p.shape, generator=generator, dtype=torch.float64), mesh, [Shard(0)]
                )
            if not extra:
                clip_grad_norm_(params, 0.5)
            optimizer.step()
        assert all(
            isinstance(s, type(params[0]))
            for p in params
            for k, s in optimizer.state[p].items()
            if k != "step"
        )
        return [p.detach().full_tensor() for p in params]

    assert_equal(run(ours(name), max_grad_norm=0.5), run(stock(name)))
