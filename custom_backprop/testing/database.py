"""The op database: every spec of every family, by name."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Iterable, Sequence
from functools import cache

import torch

from ..backends import use_backend
from . import specs
from .case import Case
from .checks import applicable
from .spec import Make, OpSpec
from .validate import Report, run


@cache
def database() -> dict[str, OpSpec]:
    """name -> spec. A family's file in ``specs/`` is found by being there."""
    found: dict[str, OpSpec] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(specs.__path__)):
        for spec in importlib.import_module(f"{specs.__name__}.{module}").SPECS:
            if spec.name in found:
                raise RuntimeError(f"two specs are named {spec.name!r}")
            found[spec.name] = spec
    return found


def named(wanted: Sequence[str]) -> list[OpSpec]:
    """The specs of those names, in the database's order: of the op of a name, or of all ops of a
    family that shares its name with no op.

    All if nothing is wanted.

    Raises:
        ValueError: neither an op nor such a family.
    """
    specs = database()
    families = sorted({s.family for s in specs.values()} - specs.keys())
    if unknown := [w for w in wanted if w not in specs and w not in families]:
        raise ValueError(
            f"no op or family {', '.join(unknown)}; there are the ops {', '.join(specs)} and the families {', '.join(families)}"
        )
    meant = {f for f in families if f in wanted}
    return [s for s in specs.values() if not wanted or s.name in wanted or s.family in meant]


#: what depends on the tracing of an op, not on the backend that then runs it: too slow to repeat on
#: every sample of every backend
TRACED = ("opcheck", "compile")

#: the ops that are compiled by Inductor too, their first sample: one of each kind, where there is a
#: compiler
INDUCTOR = frozenset({"linear_activation", "silu", "softmax", "mse_loss", "cross_entropy"})


def check_op(
    spec: OpSpec,
    backend: str,
    device: str | torch.device = "cpu",
    checks: Iterable[str] | None = None,
) -> Report:
    """Every sample of an op on one backend; the checks of :data:`TRACED` on every sample of ATen's,
    on the first elsewhere."""
    report = Report(spec.name)
    with use_backend(backend):
        for i, case in enumerate(cases(spec, device)):
            traced = i == 0 or backend == "aten"
            report.merge(run(case, [c for c in applicable(checks) if traced or c not in TRACED]))
    return report


def cases(spec: OpSpec, device: str | torch.device = "cpu") -> list[Case]:
    """The spec's samples, in float64, as cases for the checks."""
    return [
        Case(
            spec.function,
            spec.reference,
            s.args,
            s.kwargs,
            f"{spec.name} ({s.name or i})",
            double_backward=spec.double_backward,
            low_precision=spec.low_precision,
            inductor=spec.name in INDUCTOR and i == 0 and shutil.which("g++") is not None,
        )
        for i, s in enumerate(spec.samples(Make(device, torch.float64)))
    ]
