"""What is measured of an op while the site is built, and what benchmarks have measured before."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import custom_backprop
from custom_backprop.testing import Make, OpSpec, cases
from custom_backprop.testing.case import Case, gradients, outputs, weights_for
from custom_backprop.testing.sweep import units_off, value_and_derivative

from .pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
BACKENDS = ("formula", "aten", "triton")
DTYPES = (torch.float32, torch.bfloat16)
#: how many samples of an op, and how many points in [-10, 10] of an elementwise one
SAMPLES, POINTS = 3, 2001


@dataclass(frozen=True)
class Saved:
    """A tensor that autograd keeps for backward. ``what``: an argument's name, "output" or ""."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def shapes(spec: OpSpec) -> list[tuple[str, Tensor]]:
    """The tensors of a small call, by name: its arguments, then its results."""
    sample = spec.large(Make("cpu", torch.float32), "small")
    names = list(inspect.signature(spec.function).parameters)
    given = {names[i]: a for i, a in enumerate(sample.args)} | sample.kwargs
    found = [(n, a) for n, a in given.items() if isinstance(a, Tensor)]
    results = outputs(_quietly(spec.function, *sample.args, **sample.kwargs))
    if len(results) == 1:
        return [*found, ("output", results[0])]
    return found + [(f"output {i}", r) for i, r in enumerate(results)]


def saved(spec: OpSpec, function: Callable[..., Any]) -> list[Saved]:
    """What a call of the size "small" keeps for backward, each storage once."""
    sample = spec.large(Make("cpu", torch.float32), "small")
    names = list(inspect.signature(spec.function).parameters)
    given = {names[i]: a for i, a in enumerate(sample.args)} | sample.kwargs
    results = outputs(_quietly(function, *sample.args, **sample.kwargs))
    known = {_place(t): n for n, t in given.items() if isinstance(t, Tensor)}
    known |= {_place(r): "output" for r in results}
    found: dict[int, Saved] = {}
    for t in _kept([r.grad_fn for r in results]):
        if t.numel():
            found.setdefault(
                _place(t),
                Saved(
                    known.get(_place(t), ""),
                    tuple(t.shape),
                    str(t.dtype).removeprefix("torch."),
                    t.untyped_storage().nbytes(),
                ),
            )
    return list(found.values())


def _kept(nodes: list[Any]) -> Iterator[Tensor]:
    """The tensors that the nodes of a graph keep."""
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        values = list(getattr(node, "saved_tensors", ()))
        values += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in values:
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, Tensor):
                    yield t
        nodes += [following for following, _ in node.next_functions]


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Error:
    """The largest error in units in the last place; for an elementwise op, at which x."""

    units: float = 0.0
    at: float | None = None


Errors = tuple[Error, Error]


def accuracy(spec: OpSpec) -> dict[str, dict[str, Errors]]:
    """dtype -> backend or "stock" -> the errors of outputs and of gradients against float64, in
    units in the last place: of each element for an elementwise op, else of the largest element of
    a tensor."""
    found: dict[str, dict[str, Errors]] = {}
    for dtype in (d for d in DTYPES if d in spec.low_precision):
        rows: dict[str, Errors] = {}
        for case in _cases(spec, dtype):
            for name in (*BACKENDS, "stock"):
                before = rows.get(name, (Error(), Error()))
                after = _errors(case, name, spec.elementwise)
                y, dx = (max(p, key=lambda e: e.units) for p in zip(before, after, strict=True))
                rows[name] = (y, dx)
        found[str(dtype).removeprefix("torch.")] = rows
    return found


def errors_over(spec: OpSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """For an elementwise op: x, and the errors of dx there in float32, by whom it was computed."""
    (case,) = _cases(spec, torch.float32)
    x = case.leaves[0].detach()
    exact = case.to(torch.float64)
    truth = value_and_derivative(exact.call_reference, x.double())[1]
    found = {}
    for name in (*BACKENDS, "stock"):
        if name == "stock":
            dx = value_and_derivative(case.call_reference, x)[1]
        else:
            with custom_backprop.use_backend(name):
                dx = value_and_derivative(case.call, x)[1]
        found[name] = units_off(dx, truth)
    return x, found


def _cases(spec: OpSpec, dtype: torch.dtype) -> list[Case]:
    found = [
        case.to(dtype)
        for case in cases(spec)
        if not any(isinstance(v, torch.dtype) for v in case.kwargs.values())
        and all(leaf.numel() for leaf in case.leaves)
    ]
    if not spec.elementwise:
        return found[:SAMPLES]
    return [found[0].at(torch.linspace(-10, 10, POINTS, dtype=torch.float64).to(dtype))]


def _errors(case: Case, name: str, elementwise: bool) -> Errors:
    if name == "stock":
        values, grads = _quietly(gradients, case.call_reference, case.leaves)
    else:
        with custom_backprop.use_backend(name):
            values, grads = _quietly(gradients, case.call, case.leaves)
    exact = case.to(torch.float64)
    dys = tuple(w.double() for w in weights_for(values))
    truths, true_grads = _quietly(gradients, exact.call_reference, exact.leaves, dys)
    x = case.leaves[0].detach() if elementwise else None
    return _largest(values, truths, x), _largest(grads, true_grads, x)


def _largest(values: Sequence[Any], truths: Sequence[Any], x: Tensor | None) -> Error:
    errors = [
        _error(value, truth, x)
        for value, truth in zip(values, truths, strict=True)
        if value is not None and truth is not None and truth.numel()
    ]
    return max(errors, key=lambda e: e.units, default=Error())


def _error(value: Tensor, truth: Tensor, x: Tensor | None) -> Error:
    if x is not None:
        off = units_off(value.detach(), truth.detach())
        worst = int(off.argmax())
        return Error(float(off[worst]), float(x[worst]))
    value, truth = value.detach(), truth.detach()
    largest = float(truth.abs().max())
    if not largest or not math.isfinite(largest):
        return Error()
    unit = torch.finfo(value.dtype).eps * 2.0 ** math.floor(math.log2(largest))
    return Error(float((value.double() - truth).abs().max()) / unit)


@cache
def results() -> dict[str, dict[str, Any]]:
    """The tables of ratios: name -> machine and rows."""
    found = {}
    for file in sorted(RESULTS.glob("*.json")):
        table = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(table, dict) and all("op" in r for r in table.get("rows", [{}])):
            found[file.stem] = table
    return found


def speed(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of an op: name of the table -> rows."""
    found = {
        table: [r for r in content["rows"] if r["op"] == name and "error" not in r]
        for table, content in results().items()
    }
    return {table: rows for table, rows in found.items() if rows}


def curves(spec: OpSpec, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, dy/dx and the second derivative, or None where there is none, by the formula."""
    sample = next(iter(spec.samples(Make("cpu", torch.float64))))
    with custom_backprop.use_backend("formula"):
        leaf = x.clone().requires_grad_()
        y = spec.function(leaf, **sample.kwargs)
        (first,) = torch.autograd.grad(y.sum(), leaf, create_graph=spec.double_backward)
        second = None
        if spec.double_backward:
            (second,) = torch.autograd.grad(first.sum(), leaf)
    return y.detach(), first.detach(), second
