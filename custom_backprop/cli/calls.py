"""What the command ``validate`` is asked for: the code, the reference, and the calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch

from ..testing import Sample
from ..testing.inputs import Inputs, samples_of
from ..testing.record import Recording, name_of
from ..testing.spec import Make
from ..testing.target import Target, TargetError, named, own_forward, target


@dataclass(frozen=True)
class Request:
    """What the processes need to know."""

    target: str
    inputs: tuple[str, ...]
    samples: tuple[str, ...]
    recorded: tuple[str, ...]
    reference: str | None
    init: str
    imports: tuple[str, ...]
    dtype: str | None
    elementwise: bool
    rows: tuple[int, ...]
    inductor: bool
    device: str
    pretend_cuda: bool


@dataclass(frozen=True)
class Call:
    """One call, and how a script writes its inputs."""

    sample: Any
    written: str
    imports: tuple[str, ...] = ()
    inputs: Inputs | None = None


@cache
def loaded(request: Request) -> tuple[Target, Target | None, list[Call]]:
    """The code, the reference, and the calls."""
    for module in request.imports:
        try:
            __import__(module)
        except (Exception, SystemExit) as error:
            raise TargetError(f"--import {module}: {type(error).__name__}: {error}") from error
    code = target(request.target, request.init)
    reference = None
    if request.reference == "own":
        reference = Target(
            own_forward(code.value),
            (*code.imports, "from custom_backprop.testing import own_forward"),
            f"own_forward({code.expression})",
        )
    elif request.reference:
        reference = target(request.reference, request.init)
    calls = [described(Inputs.parse(text), request.device) for text in request.inputs]
    for name in request.samples:
        calls += _yielded(name, request.device)
    for path in request.recorded:
        calls += _recorded(path, code, request.device)
    return code, reference, calls


def described(inputs: Inputs, device: str) -> Call:
    """The call that a text describes. ``validate`` makes it on the CPU, if nothing else is said."""
    text = _quoted(str(inputs))
    if torch.device(device).type == "cpu":
        return Call(inputs.make(), text, (), inputs)
    importing = ("from custom_backprop.testing import Inputs",)
    return Call(inputs.make(device), f'Inputs.parse({text}).make("{device}")', importing, inputs)


def sample_of(item: Any) -> Sample:
    """What was yielded, as a sample."""
    if isinstance(item, torch.Tensor):
        return Sample((item,))
    return (samples_of(item) or [Sample(tuple(item))])[0]


def _yielded(name: str, device: str) -> list[Call]:
    found = named(name)
    makes = bool(signature(found.value).parameters)
    try:
        items = list(found.value(Make(device)) if makes else found.value())
    except Exception as error:
        raise TargetError(f"--samples {name}: {type(error).__name__}: {error}") from error
    arguments, imports = "", found.imports
    if makes:
        arguments, imports = (
            f"Make({_on(device)})",
            (*imports, "from custom_backprop.testing import Make"),
        )
    return [
        Call(item, f"list({found.expression}({arguments}))[{i}]", imports)
        for i, item in enumerate(items)
    ]


def _recorded(path: str, code: Target, device: str) -> list[Call]:
    try:
        samples = Recording.load(path).samples(code.value, device)
    except (ValueError, KeyError) as error:
        raise TargetError(f"--recorded {path}: {error.args[0]}") from error
    arguments = ", ".join(filter(None, (repr(name_of(code.value)), _on(device))))
    written = f"Recording.load({path!r}).samples({arguments})"
    imports = ("from custom_backprop.testing import Recording",)
    return [Call(sample, f"{written}[{i}]", imports) for i, sample in enumerate(samples)]


def _on(device: str) -> str:
    """A device among the arguments of a call; the CPU is the default."""
    return "" if torch.device(device).type == "cpu" else repr(device)


def _quoted(text: str) -> str:
    return f'"{text}"' if not {'"', "\\"} & {*text} else repr(text)
