"""The smallest inputs with which a check fails, and a script that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

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
    names = {"validate", *(["interpreted"] if interpreted else [])}
    lines = [*imports, *target.imports]
    arguments = [target.expression, inputs]
    if reference is not None:
        lines += reference.imports
        arguments.append(f"reference={reference.expression}")
    lines = list(dict.fromkeys(lines))
    own = "from custom_backprop.testing import "
    names |= {n for line in lines if line.startswith(own) for n in line[len(own) :].split(", ")}
    lines = sorted((line for line in lines if not line.startswith(own)), key=_order)
    arguments += [f'checks=["{check}"]', *options]
    call = f"print(validate({', '.join(arguments)}))"
    if len(call) > 96:
        first, rest = ", ".join(arguments[:2]), ", ".join(arguments[2:])
        call = f"print(\n    validate(\n        {first},\n        {rest},\n    )\n)"
    head = f"{own}{', '.join(sorted(names))}"
    if not interpreted:
        return "\n".join([*sorted([head, *lines], key=_order), "", call])
    body = "\n".join(["    " + line for line in "\n".join([*lines, call]).splitlines()])
    return f"{head}\n\nwith {interpreted}:\n{body}"


def _order(line: str) -> tuple[bool, bool, str]:
    """As PyTorch's own style sorts imports."""
    return not line.startswith("import torch"), line.startswith("from "), line
