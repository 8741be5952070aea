"""The smallest inputs with which a check fails, and a script that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from textwrap import indent

from .inputs import Inputs
from .target import Target


def smallest(inputs: Inputs, fails: Callable[[Inputs], bool], seconds: float = 10.0) -> Inputs:
    """Simpler inputs with which it still fails, found by making sizes smaller one after the other,
    until none can be, or the time is over."""
    end = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for candidate in inputs.smaller():
            if time.monotonic() > end:
                return inputs
            if fails(candidate):
                inputs, found = candidate, True
                break
    return inputs


def script(
    target: Target,
    inputs: str,
    check: str,
    reference: Target | None = None,
    *,
    options: Iterable[str] = (),
    imports: Iterable[str] = (),
    interpreted: str = "",
) -> str:
    """At most ten lines of Python that run one check.

    Args:
        target: what is validated.
        inputs: Python for the inputs.
        check: its name.
        reference: the oracle.
        options: further arguments of ``validate``, as Python.
        imports: further lines before the others.
        interpreted: the call of ``interpreted`` inside which it runs, if its kernels need it.
    """
    own = ["validate", *(["interpreted"] if interpreted else [])]
    lines = [*imports, *target.imports, *(reference.imports if reference else ())]
    lines += [f"from custom_backprop.testing import {name}" for name in own]
    arguments = [target.expression, inputs]
    if reference is not None:
        arguments.append(f"reference={reference.expression}")
    arguments += [f'checks=["{check}"]', *options]
    call = f"print(validate({', '.join(arguments)}))"
    if len(call) > 96:
        first, rest = ", ".join(arguments[:2]), ", ".join(arguments[2:])
        call = f"print(validate(\n    {first},\n    {rest},\n))"
    lines = _merged(lines)
    if not interpreted:
        return "\n".join([*lines, "", call])
    outside = [line for line in lines if "custom_backprop.testing" in line]
    inside = "\n".join(line for line in [*lines, call] if line not in outside)
    return "\n".join([*outside, "", f"with {interpreted}:", indent(inside, "    ")])


def _merged(lines: Iterable[str]) -> list[str]:
    """The same imports, sorted, with one line for each module."""
    names: dict[str, set[str]] = {}
    for line in lines:
        module, _, name = line.partition(" import ") if line.startswith("from ") else (line, "", "")
        names.setdefault(module, set()).add(name)
    merged = [
        f"{module} import {', '.join(sorted(of))}" if of != {""} else module
        for module, of in names.items()
    ]
    return sorted(merged, key=_order)


def _order(line: str) -> tuple[bool, bool, str]:
    """As PyTorch's own style sorts imports."""
    return not line.startswith("import torch"), line.startswith("from "), line
