"""Proves the backward of any code: an autograd Function, an operator, a module, a function around a
Triton kernel. Prints a verdict that can be pasted into a pull request.

The verdict is "right", "wrong" (exit code 1), or "not run" (exit code 2: nothing could). What the
code refuses clearly, such as forward mode, is "not offered", and no mistake, unless --require asks
for it. On a machine without a GPU, Triton's interpreter runs the kernels."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..testing import CHECKS, Report, Result, validate
from ..testing.inputs import Inputs, InputsError
from ..testing.reproduce import script, smallest
from ..testing.target import TargetError
from ..testing.versions import device_name, versions
from . import INTERRUPTED
from .calls import Call, Request, described, loaded, sample_of
from .work import add_jobs, check_device, check_file, in_processes, refuse

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "target",
        metavar="pkg.module:callable",
        help="an autograd Function, a function, a module's class, or a function without parameters "
        "that makes one of these; or an operator, torch.ops.namespace.name. The working directory "
        "can be imported",
    )
    calls = parser.add_argument_group("inputs (each may be given several times; all are tried)")
    calls.add_argument(
        "--inputs",
        action="append",
        default=[],
        metavar="TEXT",
        help='the arguments of a call, such as "f32[8,16] requires_grad, i64[8] < 16, eps=1e-5"; '
        "see below",
    )
    calls.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="pkg.module:function",
        help="a function that yields calls: tuples of arguments, dicts of keyword arguments, "
        "texts, or custom_backprop.testing.Sample",
    )
    calls.add_argument(
        "--recorded",
        action="append",
        default=[],
        metavar="FILE",
        help="calls that custom_backprop.testing.record saw",
    )
    parser.add_argument(
        "--reference",
        metavar="R",
        help="the oracle: torch.nn.functional.silu, pkg.module:callable; or own: the code's own "
        "forward, where it is plain torch, differentiated by autograd. Without one, the checks "
        "that need it do not apply",
    )
    parser.add_argument(
        "--init",
        default="",
        metavar="TEXT",
        help='the arguments of a module\'s class or of a factory, such as "16, eps=1e-5"',
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import this first: a module that registers operators",
    )
    parser.add_argument(
        "--check",
        action="append",
        choices=list(CHECKS),
        dest="checks",
        metavar="NAME",
        help=f"only this check; may be given several times; one of {', '.join(CHECKS)}",
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        choices=[*CHECKS, "all"],
        metavar="NAME",
        help="a check that must be right, and not only not offered; or all",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="in which derivatives are checked; default: float64 if the code computes in it",
    )
    parser.add_argument(
        "--elementwise",
        action="store_true",
        help="each element of the result depends on one element of the one differentiated tensor: "
        "every 16-bit number is tried",
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="argument N is a batch, of which no row depends on another (batch_invariance); may be "
        "given several times; the first is 0",
    )
    parser.add_argument(
        "--inductor", action="store_true", help="also compile with Inductor, which takes longer"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pretend-cuda",
        action="store_true",
        help="without a GPU, for code that refuses to run there: CPU tensors say that they are on "
        "one",
    )
    add_jobs(parser)
    parser.add_argument("--json", metavar="F", help="also write the report to this file")
    parser.add_argument("--junit", metavar="F", help="also write JUnit's XML")
    parser.add_argument(
        "--html", metavar="F", help="also write a page with plots of the error; one file"
    )


EPILOG = """\
inputs, by example:
  f32[8,16]                    dtypes f64 f32 bf16 f16 i64 i32 i16 i8 u8 bool; f32[] for a number
  f32[8] requires_grad         differentiated (if none is: every floating-point tensor)
  f32[8] in 0..1               drawn from 0 <= x < 1; default -3..3, integers 0..2
  i64[8] < 16                  integers 0 <= x < 16
  f32[8,16] transposed         or sliced, expanded, strides(32,1), offset 3
  2, 1e-5, 'mean', None, (3,)  values of Python; torch.float32
  weight=f32[16]               a keyword argument
  seed 3                       other random numbers

examples:
  custom-backprop validate my.kernels:Silu --inputs "f32[8,16]" --elementwise \\
      --reference torch.nn.functional.silu
  custom-backprop validate my.layers:Norm --init 16 --inputs "f32[8,16] requires_grad" \\
      --reference own --require forward_mode --html report.html
"""


#: the work that measures what --html draws
PLOTS = "plots"


class Refused(str):
    """Why a request makes no sense."""


def run(args: argparse.Namespace) -> int:
    """Returns 1 if something is wrong, or not right though required; 2 if nothing could run; 130
    after an interruption."""
    for option in ("json", "junit", "html"):
        check_file(getattr(args, option), f"--{option}")
    check_device(args.device)
    request = _request(args)
    checks = args.checks or list(CHECKS)
    if unknown := sorted({*args.require} - {*checks, "all"}):
        refuse(f"--require {unknown[0]}: it is not among --check {' '.join(checks)}")
    work = [*checks, *([PLOTS] if args.html else [])]
    results = in_processes(_check, [(name, request) for name in work], args.jobs, "check")
    if len(results) < len(work):
        return INTERRUPTED
    report = _report(request.target, {name: result for (name, _), result in results.items()})
    report.about = {
        **versions(request.target.partition(":")[0]),
        "on": device_name(args.device),
        "command": shlex.join(["custom-backprop", *args.arguments]),
    }
    for path, written in (
        (args.json, report.to_json),
        (args.junit, report.to_junit),
        (args.html, report.to_html),
    ):
        if path:
            Path(path).write_text(written() + "\n")
    print(report.to_markdown())
    missing = report.missing(args.require)
    if missing:
        print("\nrequired: " + ", ".join(f"{r.check} is {r.status}" for r in missing))
    if report.failures or missing:
        return 1
    return 0 if report.ok else 2


def _report(title: str, results: dict[str, Any]) -> Report:
    """What all processes found, in one report."""
    report = Report(title)
    for check, result in results.items():
        if isinstance(result, Refused):
            refuse(result)
        if isinstance(result, Report):
            report.merge(result)
        elif check != PLOTS:  # an exception: not of the code, but of its process
            reason = str(result) if type(result) is RuntimeError else repr(result)
            report.merge(Report(title, [Result(check, "not run", reason)]))
    return report


def _request(args: argparse.Namespace) -> Request:
    if not (args.inputs or args.samples or args.recorded):
        refuse("what is it called with? Give --inputs, --samples or --recorded")
    for option, texts in (("--inputs", args.inputs), ("--init", [args.init] if args.init else [])):
        for text in texts:
            try:
                Inputs.parse(text)
            except InputsError as error:
                refuse(f"{option}: {error}")
    for path in args.recorded:
        if not Path(path).is_file():
            refuse(f"--recorded {path}: there is no such file")
    return Request(
        args.target,
        tuple(args.inputs),
        tuple(args.samples),
        tuple(args.recorded),
        args.reference,
        args.init,
        tuple(args.imports),
        args.dtype,
        args.elementwise,
        tuple(args.rows),
        args.inductor,
        args.device,
        args.pretend_cuda,
    )


def _check(check: str, request: Request) -> Report | Refused:
    """Runs in a process of its own: one check on all calls."""
    try:
        with _environment(request) as launches:
            return _checked(check, request, launches)
    except (TargetError, InputsError) as error:
        return Refused(error)


@contextmanager
def _environment(request: Request) -> Iterator[list[Any]]:
    """The working directory is importable, and without a GPU the interpreter runs Triton's kernels.
    Gives the list of those launched."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    launches: list[Any] = []
    with ExitStack() as entered:
        if torch.device(request.device).type == "cpu" and find_spec("triton"):
            from ..testing.interpreter import interpreted, kernels

            def observe(kernel: Any, args: Any, kwargs: Any) -> None:
                launches.append(kernel)

            entered.enter_context(interpreted(pretend_cuda=request.pretend_cuda))
            kernels.observers.append(observe)
            entered.callback(kernels.observers.remove, observe)
        yield launches


def _checked(check: str, request: Request, launches: list[Any]) -> Report:
    code, reference, calls = loaded(request)
    oracle = reference.value if reference else None

    def judged(inputs: Any) -> Report:
        try:
            return validate(
                code.value,
                inputs,
                oracle,
                checks=[check] if check != PLOTS else [],
                dtype=DTYPES.get(request.dtype or ""),
                elementwise=request.elementwise,
                rows=request.rows,
                inductor=request.inductor,
                plots=check == PLOTS,
                name=request.target,
            )
        except (TypeError, ValueError) as error:
            raise TargetError(f"{request.target}: {error}") from error

    report = Report(request.target)
    for call in calls:
        of_one = judged(call.sample)
        if any(not r.script for r in of_one.failures) and not report.failures:
            call = _smaller(call, judged, request.device)
            text = script(
                code,
                call.written,
                check,
                reference,
                options=_options(request),
                imports=[*(f"import {m}" for m in request.imports), *call.imports],
                interpreted=_interpreted(request) if launches else "",
            )
            example = str(call.inputs) if call.inputs else ""
            of_one = judged(call.sample)
            of_one.results = [replace(r, example=example, script=text) for r in of_one.results]
        report.merge(of_one)
    if launches:
        report.notes.append("Triton's interpreter ran its kernels")
    return report


def _smaller(call: Call, judged: Callable[[Any], Report], device: str) -> Call:
    """The smallest call of this kind that fails as well; itself, if it fails with its values
    alone."""

    def fails(inputs: Inputs) -> bool:
        try:
            return bool(judged(inputs.make(device)).failures)
        except TargetError:
            return False

    try:
        inputs = call.inputs or Inputs.of(sample_of(call.sample))
    except ValueError:  # it has arguments that no text describes
        return call
    if call.inputs is None and not fails(inputs):
        return call
    return described(smallest(inputs, fails), device)


def _options(request: Request) -> list[str]:
    found = [f"dtype=torch.{request.dtype}"] if request.dtype else []
    found += ["elementwise=True"] if request.elementwise else []
    found += [f"rows={request.rows}"] if request.rows else []
    return found + (["inductor=True"] if request.inductor else [])


def _interpreted(request: Request) -> str:
    return f"interpreted({'pretend_cuda=True' if request.pretend_cuda else ''})"
