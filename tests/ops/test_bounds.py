"""How simple an op stays: Python frames of a call, lines of a definition. Counted, not timed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

import custom_backprop
from custom_backprop import functional
from custom_backprop.backends import interpreting
from custom_backprop.backends.kernels import kernels
from custom_backprop.ops import route
from custom_backprop.testing import Make, database

PACKAGE = Path(custom_backprop.__file__).parent

#: functions, and their files, that one forward on plain tensors may enter before its
#: implementation: of an op, and of a loss, which also chooses a reduction and whether to make its
#: gradient (docs/architecture.md)
AN_OP, A_LOSS = (8, 4), (15, 6)


def frames_of(call):
    """(file, function) of each Python frame of ours that ``call`` enters."""
    seen = []

    def profile(frame, event, _):
        name = frame.f_code.co_filename
        is_function = not frame.f_code.co_name.startswith("<")  # nor a comprehension
        if event == "call" and is_function and (str(PACKAGE) in name or "triton_kernels" in name):
            seen.append((Path(name), frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


#: calls of Python and of C in one forward without a gradient, in one with it, and in our part of
#: its backward, on the way of a GPU: a launch has 2 for each tensor and 4 more
CALLS = {
    "relu": (33, 38, 38),
    "softmax": (39, 44, 36),
    "mse_loss": (68, 84, 36),
    "cross_entropy": (67, 87, 35),
    "layer_norm": (55, 60, 67),
    "linear": (34, 39, 49),
}


def calls_of(call, first=None):
    """Each call of Python and of C in ``call``, or in the function ``first`` that it enters."""
    seen, outermost = [], []

    def profile(frame, event, function):
        name = f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}"
        if event == "call" and not outermost and first in (None, name):
            outermost.append(frame)
        elif event == "return" and [frame] == outermost:
            sys.setprofile(None)
        elif outermost and event == "call":
            seen.append(name)
        elif outermost and event == "c_call":
            seen.append(f"    {function.__name__}")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.fixture
def gpu(monkeypatch):
    """Tensors of the CPU take the way of a GPU's, to a driver that does nothing."""
    launch = kernels("launch")
    generated = launch.Kernel._generated

    def compiled_at_once(self, numbers, compiled, by_triton, *rest):
        def by_nobody(key, *tensors, **others):
            compiled[key] = -1, lambda *args: None, "function", "metadata"

        return generated(self, numbers, compiled, by_nobody, *rest)

    def forget_plans():
        modules = [m for name, m in list(sys.modules.items()) if "triton_kernels." in name]
        for plan in [v for m in modules for v in vars(m).values() if hasattr(v, "cache_clear")]:
            plan.cache_clear()

    monkeypatch.setattr(launch.Kernel, "_generated", compiled_at_once)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(route, "backend_of", lambda t: "triton")
    forget_plans()
    yield
    forget_plans()


@pytest.mark.skipif(not interpreting(), reason="on a GPU the driver is a real one")
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_python_and_of_c(name, gpu):
    sample = database()[name].large(Make(DEVICE, torch.float32), "small")
    args = [
        a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in sample.args
    ]

    def call():
        return getattr(functional, name)(*args, **sample.kwargs)

    def without_gradient():
        with torch.no_grad():
            call()
            return calls_of(call)

    y = call()
    dy = torch.ones_like(y)
    call().backward(dy)
    found = {
        "forward": without_gradient(),
        "forward with a gradient": calls_of(call),
        "backward": calls_of(lambda: y.backward(dy), "route.py: backward"),
    }
    for (what, seen), bound in zip(found.items(), CALLS[name], strict=True):
        assert len(seen) <= bound, "\n".join([f"{what}: {len(seen)} calls", *seen])


def is_implementation(file):
    """A formula, a family's implementations, or the walk of one through its chunks."""
    return file.parent.name == "formulas" or (
        file.parent.name == "backends"
        and (file.name == "tasks.py" or (PACKAGE / "formulas" / file.name).exists())
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are launched there")
@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_frames_of_one_forward(spec):
    sample = spec.large(Make(DEVICE, torch.float32), "small")
    args = [
        a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in sample.args
    ]

    def call():
        return spec.function(*args, **sample.kwargs)

    y = call()
    frames = [(f, name) for f, name in frames_of(call) if not is_implementation(f)]
    further = sum(name == "forward" for _, name in frames) - 1  # info_nce is three ops
    told = "\n".join(f"{file.relative_to(PACKAGE.parent)}: {name}" for file, name in frames)
    functions, files = A_LOSS if torch.is_tensor(y) and y.dim() == 0 else AN_OP
    assert len(frames) <= functions + AN_OP[0] * further, told
    assert len({file for file, _ in frames}) <= files, told
    packages = {file.stem if file.stem == "route" else file.parent.name for file, _ in frames}
    assert packages <= {"functional", "route", "ops", "backends"}, told


def test_lines_of_a_definition():
    """At most 40 an op, in each family's file."""
    for file in (PACKAGE / "ops").glob("*.py"):
        if file.stem in ("__init__", "route", "gradient"):
            continue
        source = file.read_text()
        definitions = sum(
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "op"
            for node in ast.walk(ast.parse(source))
        )
        family = [s for s in database().values() if s.family == file.stem]
        ops = max(definitions, len(family))
        assert ops, f"{file.name} defines no op"
        assert source.count("\n") <= 40 * ops + 20, f"{file.name}: {source.count(chr(10))} lines"


@pytest.mark.parametrize("package", ["functional", "ops", "backends"])
def test_nothing_central_names_ops(package):
    """A new op edits no file that names other ops: what is not a family's file names none."""
    families = {file.stem for file in (PACKAGE / "formulas").glob("*.py")} - {"__init__"}
    ops = {spec.name for spec in database().values()}
    for file in (PACKAGE / package).glob("*.py"):
        if file.stem not in families:
            nodes = ast.walk(ast.parse(file.read_text()))
            strings = {n.value for n in nodes if isinstance(n, ast.Constant)}
            assert not ops & strings, f"{package}/{file.name} names {sorted(ops & strings)}"
