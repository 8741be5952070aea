"""``validate``: all checks that a backward written by hand must pass, in one call, for any
Function, kernel or module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .case import Case, is_float, of_module
from .curves import curves
from .inputs import Inputs, samples_of
from .prepare import CannotRun, prepared
from .report import Report, Result
from .run import applicable, run
from .spec import Sample


def validate(
    fn_or_module: Callable[..., Any] | nn.Module,
    inputs: Tensor | Sequence[Any] | str | Sample | Inputs,
    reference: Callable[..., Any] | nn.Module | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    checks: list[str] | None = None,
    double_backward: bool = True,
    dtype: torch.dtype | None = None,
    low_precision: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    inductor: bool = False,
    elementwise: bool = False,
    rows: Sequence[int] = (),
    plots: bool = False,
    name: str | None = None,
) -> Report:
    """Proves a backward against torch.

    Args:
        fn_or_module: a function of tensors (``MyFunction.apply``, a kernel's wrapper); an autograd
            Function, of which ``apply`` is meant; or a module, whose parameters are then
            differentiated as well.
        inputs: the positional arguments, or a single tensor; or a text that describes them, such as
            ``"f32[8,16] requires_grad, i64[8] < 16"`` (:mod:`custom_backprop.testing.inputs`); or a
            :class:`Sample`, which may have keyword arguments; or a list of texts or samples, for as
            many calls. Floating-point tensors are converted to ``dtype``. Those that require grad
            are differentiated (all of them if none does). They should be small, a few dozen
            elements: gradcheck evaluates the function twice per element.
        reference: the same function by stock torch (with the same parameters, if both are modules).
            Without it, the checks that need an oracle do not apply.
        kwargs: keyword arguments of every call. Their tensors that require grad are differentiated
            as well.
        checks: names of :data:`custom_backprop.testing.CHECKS`. Default: all.
        double_backward: False states that there is no second derivative, and requesting one must
            raise.
        dtype: float64, in which derivatives are checked to twelve digits; or float32, whose results
            are compared with a truth in float64. Default: float64, unless the function refuses it
            or computes in float32 whatever comes in.
        low_precision: the dtypes in which the error against float64 must not exceed the reference's
            own.
        inductor: also compile with Inductor, which needs a C++ compiler and some seconds.
        elementwise: states that each element of the result depends only on the same element of the
            one differentiated tensor. Every 16-bit number is then tried.
        rows: states that the results of a row do not depend on the other rows: the positions of the
            arguments of shape (rows, ...). :func:`~.checks.batch_invariance` then applies.
        plots: also measure the errors over the range of the inputs, which ``to_html`` draws.
        name: the report's title.

    Returns:
        a :class:`Report`, to print, to serialise, or to assert with ``.raise_if_failed()``.

    Raises:
        TypeError: ``fn_or_module`` cannot be called, or is the class of a module; no input is a
            floating-point tensor, or one is a list or dict of tensors, which would not be
            differentiated.
        ValueError: an unknown check, another dtype, ``elementwise`` with several differentiated
            tensors, or ``rows`` that are not tensors.
    """
    fn_or_module = _callable(fn_or_module)
    title = name or _title(fn_or_module)
    if (samples := samples_of(inputs)) is not None:
        report = Report(title)
        for s in samples:
            of_one = validate(
                fn_or_module,
                s.args,
                reference,
                kwargs={**(kwargs or {}), **s.kwargs},
                checks=checks,
                double_backward=double_backward,
                dtype=dtype,
                low_precision=low_precision,
                inductor=inductor,
                elementwise=elementwise,
                rows=rows,
                plots=plots,
                name=title,
            )
            report.merge(of_one)
        return report
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(cast(Sequence[Any], inputs))
    args, kwargs = _differentiated(args, kwargs or {})
    function: Callable[..., Any] = fn_or_module
    if isinstance(fn_or_module, nn.Module):
        function, reference, args = of_module(fn_or_module, reference, args)
    if any(
        is_float(t)
        for a in (*args, *kwargs.values())
        if not isinstance(a, Tensor)
        for t in tree_leaves(a)
    ):
        raise TypeError(
            "validate differentiates tensors that are arguments by themselves: take them out of "
            "lists, tuples and dicts"
        )
    function, reference, args, kwargs = _positional(function, reference, args, kwargs)
    if not any(map(is_float, args)):
        raise TypeError(
            "validate needs a floating-point tensor among the inputs, got "
            f"{[type(a).__name__ for a in args]}"
        )
    case = Case(
        function,
        reference,
        args,
        kwargs,
        title,
        double_backward=double_backward,
        low_precision=low_precision,
        inductor=inductor,
        elementwise=elementwise,
        rows=tuple(rows),
    )
    for i in rows:
        if not (0 <= i < len(args) and isinstance(args[i], Tensor) and args[i].dim()):
            raise ValueError(f"rows={tuple(rows)}: argument {i} is not a tensor with rows")
    if elementwise and len(case.wanted) != 1:
        raise ValueError(
            f"an elementwise function has one differentiated tensor, not {len(case.wanted)}"
        )
    wanted = list(applicable(checks))
    try:
        case, notes = prepared(case, dtype)
    except CannotRun as reason:
        return Report(title, [Result(check, "not run", str(reason)) for check in wanted])
    report = run(case, wanted)
    report.notes = notes
    report.curves = curves(case) if plots else []
    return report


def _callable(given: Any) -> Callable[..., Any]:
    """What is validated: of an autograd Function, its ``apply``."""
    if isinstance(given, type) and issubclass(given, torch.autograd.Function):
        return given.apply
    if isinstance(given, type):
        raise TypeError(
            f"validate needs a function or a module, got the class {given.__name__}: make an "
            "instance of it"
        )
    if not callable(given):
        raise TypeError(f"validate needs a function or a module, got {type(given).__name__}")
    return given


def _title(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner.__name__  # of Function.apply
    return getattr(function, "__name__", None) or type(function).__name__


def _differentiated(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, of which some require grad: if none does, all that are positional, or all by
    keyword if those are none."""

    def wanted(a: Any) -> Any:
        return a.detach().requires_grad_() if is_float(a) else a

    if any(is_float(a) and a.requires_grad for a in (*args, *kwargs.values())):
        return args, kwargs
    if any(map(is_float, args)):
        return tuple(map(wanted, args)), kwargs
    return args, {name: wanted(a) for name, a in kwargs.items()}


def _positional(
    function: Any, reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """The same call with differentiated keyword arguments after the positional ones."""
    names = [name for name, value in kwargs.items() if is_float(value) and value.requires_grad]
    if not names:
        return function, reference, args, kwargs

    def moved(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *all_, **rest: of(
            *all_[: len(args)], **dict(zip(names, all_[len(args) :], strict=True)), **rest
        )

    rest = {name: value for name, value in kwargs.items() if name not in names}
    return (
        moved(function),
        reference and moved(reference),
        (*args, *(kwargs[name] for name in names)),
        rest,
    )
