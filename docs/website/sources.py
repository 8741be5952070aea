"""Which functions an op runs: its formulas and its kernels, found by running it."""

from __future__ import annotations

import ast
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import custom_backprop
from custom_backprop.testing import Make, OpSpec, Sample
from custom_backprop.testing.case import outputs

from .pages import ROOT

FORMULAS, KERNELS = ROOT / "custom_backprop" / "formulas", ROOT / "triton_kernels"
#: what every op runs, and no op is about
SHARED = {FORMULAS / "precision.py", FORMULAS / "constant.py", FORMULAS / "scale.py"}
JIT = {"kernel", "triton.jit"}


@dataclass(frozen=True)
class Function:
    """A function as it stands in its file."""

    file: Path
    name: str
    line: int
    text: str
    decorators: frozenset[str]
    docstring: str


@cache
def functions(file: Path) -> dict[int, Function]:
    """The functions of a file, methods too, by the line of ``def`` or of its first decorator."""
    text = file.read_text(encoding="utf-8")
    lines = text.split("\n")
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            decorators = frozenset(ast.unparse(d) for d in node.decorator_list)
            docstring = ast.get_docstring(node) or ""
            function = Function(file, node.name, first, source, decorators, docstring)
            found[node.lineno] = found[first] = function
    return found


def backward_of(spec: OpSpec, sample: Sample) -> None:
    """One forward and one backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = outputs(spec.function(*sample.args, **sample.kwargs))
        roots = [r for r in results if r.requires_grad]
        tensors = [a for a in sample.args if isinstance(a, torch.Tensor) and a.requires_grad]
        torch.autograd.grad(roots, tensors, [torch.ones_like(r) for r in roots], allow_unused=True)


def entered(call: Callable[[], Any], folder: Path) -> list[Function]:
    """The functions of a folder's files that a call enters, each once, in their order."""
    seen: dict[tuple[str, int], None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name[0] != "<" and code.co_filename.startswith(str(folder)):
            seen.setdefault((code.co_filename, code.co_firstlineno))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    found = [functions(Path(file)).get(line) for file, line in seen]
    return list(dict.fromkeys(f for f in found if f))


def _run(spec: OpSpec, backend: str) -> None:
    with custom_backprop.use_backend(backend):
        for sample in spec.samples(Make("cpu", torch.float32)):
            if not any(isinstance(a, torch.Tensor) and not a.numel() for a in sample.args):
                backward_of(spec, sample)
                return


def formulas(spec: OpSpec) -> list[Function]:
    """The mathematics that it runs, forward first."""
    found = entered(lambda: _run(spec, "formula"), FORMULAS)
    return [f for f in found if f.file not in SHARED and f.name != "__init__"]


def kernels(spec: OpSpec) -> tuple[list[Function], list[Function]]:
    """The kernels and the functions on the device that it runs; and, of those, what it shares with
    other families."""
    found = entered(lambda: _run(spec, "triton"), KERNELS)
    device = [f for f in found if f.decorators & JIT]
    own = [f for f in device if f.file.stem not in ("rows", "elementary", "launch")]
    return own, [f for f in device if f not in own and f.file.stem != "launch"]
