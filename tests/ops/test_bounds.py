"""How simple an op stays: Python frames of a call, lines of a definition. Counted, not timed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

import custom_backprop
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


def is_implementation(file):
    return file.parent.name == "formulas" or (
        (PACKAGE / "formulas" / file.name).exists() and (file.parent.name == "backends")
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
