"""The op database: every spec of every family, by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch

from ..backends import interpreting, use_backend
from . import specs
from .case import Case
from .interpreter.faster import remember_builtins
from .outcome import COSTLY, ENOUGH, FIRST_SAMPLE, OF_KERNELS, SEARCHED
from .report import Report, Result
from .run import applicable, run
from .spec import Make, OpSpec


@cache
def database() -> dict[str, OpSpec]:
    """name -> spec. Every file in ``specs/`` is a family."""
    found: dict[str, OpSpec] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(specs.__path__)):
        for spec in importlib.import_module(f"{specs.__name__}.{module}").SPECS:
            if spec.name in found:
                raise RuntimeError(f"two specs are named {spec.name!r}")
            found[spec.name] = spec
    return found


def named(wanted: Sequence[str]) -> list[OpSpec]:
    """The specs of these names, in the database's order. A name is that of an op, or of a family,
    which means all its ops. If a family has the name of an op, the name means only the op.

    No names mean all ops.

    Raises:
        ValueError: a name is neither that of an op nor of a family.
    """
    ops = database()
    families = sorted({s.family for s in ops.values()} - ops.keys())
    if unknown := [w for w in wanted if w not in ops and w not in families]:
        raise ValueError(
            f"no op or family {', '.join(unknown)}; there are the ops {', '.join(ops)} "
            f"and the families {', '.join(families)}"
        )
    meant = {f for f in families if f in wanted}
    return [s for s in ops.values() if not wanted or s.name in wanted or s.family in meant]


def check_op(
    spec: OpSpec,
    backend: str,
    device: str | torch.device = "cpu",
    checks: Iterable[str] | None = None,
) -> Report:
    """Checks every sample of an op on one backend. Those of :data:`~.outcome.FIRST_SAMPLE` run on
    every sample with ATen, and only on the first with other backends; those of
    :data:`~.outcome.COSTLY` on the first sample of representative ops, with ATen; those of
    :data:`~.outcome.ENOUGH` with ATen. Those that search run on the first sample with ATen, and on
    a GPU with any backend. Those of Triton kernels are left to the command ``kernels``, which knows
    more of ours."""
    report = Report(spec.name)
    interpreted = backend != "aten" and torch.device(device).type == "cpu"
    if backend == "triton" and interpreting():
        remember_builtins()
    with use_backend(backend):
        for i, case in enumerate(cases(spec, device)):
            left_out = OF_KERNELS | (SEARCHED if i or interpreted else set())
            if i or backend != "aten" or not spec.representative:
                left_out |= COSTLY
            if i and backend != "aten":
                left_out |= FIRST_SAMPLE
            if backend != "aten":
                left_out |= ENOUGH
            report.merge(run(case, [c for c in applicable(checks) if c not in left_out]))
            if i == 0:
                reason = (
                    "run with ATen, on ops that represent the others, or by the command kernels"
                )
                skipped = [Result(c, "n/a", reason) for c in applicable(checks) if c in left_out]
                report.merge(Report(spec.name, skipped))
    for i, r in enumerate(report.results):
        excuse = spec.excused.get((backend, r.check)) or spec.excused.get(("", r.check))
        if excuse and r.status in ("wrong", "not offered"):
            report.results[i] = replace(r, status="n/a", detail=excuse)
    return report


def cases(spec: OpSpec, device: str | torch.device = "cpu") -> list[Case]:
    """The spec's samples, in float64, as cases for the checks. For an elementwise op, every 16-bit
    number is tried once for each set of keyword arguments."""
    found: list[Case] = []
    for i, s in enumerate(spec.samples(Make(device, torch.float64))):
        met = any(case.kwargs == s.kwargs for case in found) if spec.elementwise else True
        found.append(
            Case(
                spec.function,
                spec.reference,
                s.args,
                s.kwargs,
                f"{spec.name} ({s.name or i})",
                double_backward=spec.double_backward,
                low_precision=spec.low_precision,
                inductor=spec.representative and i == 0,
                elementwise=not met,
            )
        )
    return found
