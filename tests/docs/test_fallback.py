"""``custom_backprop.nn``, ``functional`` and ``optim`` take the place of torch's in a user's file:
what is ours is ours, and every other name is torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import python

import custom_backprop
from custom_backprop import functional, nn, optim

PAIRS = [
    pytest.param(nn, torch.nn, id="nn"),
    pytest.param(functional, torch.nn.functional, id="functional"),
    pytest.param(optim, torch.optim, id="optim"),
    pytest.param(nn.utils, torch.nn.utils, id="utils"),
    pytest.param(nn.attention, torch.nn.attention, id="attention"),
]
#: modules of ours that take the place of torch's
OURS = {"functional", "utils", "attention"}


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_every_public_name_of_torch_is_there(ours, stock):
    for name in (n for n in dir(stock) if n[0] != "_"):
        found = getattr(ours, name)
        if name in ours.__all__ and ours is not nn.utils:
            assert found.__module__.startswith(custom_backprop.__name__), name
        elif ours is not nn or name not in OURS:
            assert found is getattr(stock, name), name
        assert name in dir(ours)


def test_modules_within_modules():
    assert nn.functional is functional
    assert nn.attention.sdpa_kernel is torch.nn.attention.sdpa_kernel
    assert nn.attention.MultiheadAttention is nn.MultiheadAttention
    assert nn.utils.rnn is torch.nn.utils.rnn
    assert nn.utils.clip_weights_.__module__ == "custom_backprop.nn.utils"
    assert nn.init is torch.nn.init
    assert optim.lr_scheduler is torch.optim.lr_scheduler


def test_the_import_statements_of_torch_work():
    python(
        "import custom_backprop.nn.functional as F; import custom_backprop\n"
        "assert F is custom_backprop.functional\n"
        "from custom_backprop.nn import Conv2d, Linear, Module\n"
        "from custom_backprop.optim import Optimizer, lr_scheduler\n"
        "import torch\n"
        "assert Module is torch.nn.Module and Conv2d is torch.nn.Conv2d\n"
        "assert Linear.__module__ == 'custom_backprop.nn.linear'\n"
    )


def test_a_star_import_gives_ours_alone():
    for module in (nn, functional, optim):
        assert not {"Module", "conv2d", "NAdam", "TYPE_CHECKING"} & {*module.__all__}
        assert [n for n in module.__all__ if not hasattr(module, n)] == []


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_a_name_that_neither_has(ours, stock):
    message = f"{ours.__name__}' has no attribute 'Nope', and neither has '{stock.__name__}'"
    with pytest.raises(AttributeError, match=message):
        ours.Nope  # noqa: B018
    # torch.nn.utils is a package and ours is not: __path__ would say so
    assert hasattr(ours, "__path__") == (ours.__spec__.submodule_search_locations is not None)


def test_a_function_that_torch_gets_later_is_found(monkeypatch):
    def conv2d(x):
        return x

    assert functional.conv2d is torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    assert functional.conv2d is conv2d


SCRIPT = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.scale * F.gelu(self.norm(self.conv(x)))

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), Block(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(),
    nn.Linear(8, 3),
).double()
optimizer = optim.AdamW(model.parameters(), lr=1e-2)
schedule = optim.lr_scheduler.StepLR(optimizer, 5)
x, target = torch.randn(16, 1, 8, 8).double(), torch.randint(0, 3, (16,))
losses = []
for step in range(8):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(F.pad(x, (0, 0, 0, 0))), target)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
"""


def test_a_users_script_gives_the_same_losses():
    exchanged = SCRIPT
    for old, new in (
        ("torch.nn.functional", "custom_backprop.functional"),
        ("torch.nn ", "custom_backprop.nn "),
        ("torch.optim", "custom_backprop.optim"),
    ):
        exchanged = exchanged.replace(f"import {old}", f"import {new}")
    stock, ours = {"__name__": "stock"}, {"__name__": "ours"}
    exec(SCRIPT, stock)
    exec(exchanged, ours)
    assert type(ours["model"][4]) is nn.Linear
    assert type(ours["model"][1].norm) is nn.BatchNorm2d
    assert type(ours["optimizer"]) is optim.AdamW
    assert isinstance(ours["model"], torch.nn.Sequential)
    torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-11, atol=0)
    assert ours["losses"][-1] < 0.8 * ours["losses"][0]


def test_compiles_without_a_break():
    weight = torch.randn(4, 3, 3, 3)

    def call(x):
        return functional.max_pool2d(functional.silu(functional.conv2d(x, weight)), 2)

    x = torch.randn(1, 3, 8, 8)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), call(x))


USES_TYPES = """
import custom_backprop.nn as nn
import custom_backprop.nn.functional as F
import custom_backprop.optim as optim
from custom_backprop.nn import Module

reveal_type(nn.Linear(1, 1))
reveal_type(nn.Conv2d(1, 1, 1))
reveal_type(nn.Sequential())
reveal_type(nn.functional.swiglu)
reveal_type(F.conv2d)
reveal_type(optim.Adam([]))
reveal_type(optim.NAdam([]))
reveal_type(optim.lr_scheduler.StepLR)
nn.Nope


class Net(Module):
    pass
"""


def test_mypy_sees_our_types_and_torchs(tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the extra 'dev'")
    (tmp_path / "use.py").write_text(USES_TYPES)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "use.py"]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(custom_backprop.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line.split(" is ", 1)[-1] for line in done.stdout.splitlines()]
    starts = [
        '"custom_backprop.nn.linear.Linear"',
        '"torch.nn.modules.conv.Conv2d"',
        '"torch.nn.modules.container.Sequential"',
        '"def (input: torch._tensor.Tensor, value:',
        '"Overload(def (input: torch._tensor.Tensor, weight:',
        '"custom_backprop.optim.adam.Adam"',
        '"torch.optim.nadam.NAdam"',
        '"def (optimizer: torch.optim.optimizer.Optimizer, step_size:',
        'use.py:15: error: Module has no attribute "Nope"',
        "Found 1 error",
    ]
    assert len(found) == len(starts), done.stdout
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start), line
