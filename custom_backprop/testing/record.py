"""What a model calls its Functions, modules and custom operators with, to validate them with it."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .checks.traced import Recorder
from .inputs import Inputs, TensorOf
from .spec import Sample

VERSION = 1


@dataclass
class Recording:
    """What was called, with which inputs.

    Attributes:
        calls: ``pkg.module:Class`` of a Function or module, or ``torch.ops.namespace.operator`` ->
            each kind of inputs once, as a text that :func:`~custom_backprop.testing.validate`
            takes, with the data of its tensors if they were asked for.
        left_out: the same names -> why a call could not be described.
    """

    calls: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def samples(self, of: Any = None, device: str | torch.device = "cpu") -> list[Sample]:
        """The calls of one of them, with the data if there are any, else with random values.

        Args:
            of: its name, or itself: a Function, its ``apply``, a module or its class, or an
                operator. May be left out if only one was called.
            device: that of the tensors.

        Raises:
            KeyError: it was not called.
        """
        name = next(iter(self.calls)) if of is None and len(self.calls) == 1 else name_of(of)
        if name not in self.calls:
            raise KeyError(f"no call of {name} was recorded; there are {', '.join(self.calls)}")
        return [_sample(text, data, device) for text, data in self.calls[name].items()]

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        found = {"format": __name__, "version": VERSION, "torch": torch.__version__}
        found |= {"calls": self.calls, "left_out": self.left_out}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else, or of a later version.
        """
        try:
            found = json.loads(Path(path).read_text())
            version = found["version"] if found["format"] == __name__ else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a recording of {__name__}") from error
        if version != VERSION:
            raise ValueError(f"{path}: version {version} of {__name__}; this one reads {VERSION}")
        return cls(found["calls"], found["left_out"])

    def _add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], data: bool) -> None:
        try:
            inputs = Inputs.of(Sample(args, kwargs))
            inputs = Inputs(inputs.args, inputs.kwargs, len(self.calls.get(name, ())))
        except ValueError as error:
            reasons = self.left_out.setdefault(name, [])
            if str(error) not in reasons:
                reasons.append(str(error))
            return
        met = self.calls.setdefault(name, {})
        if data or all(_without_seed(text) != _without_seed(str(inputs)) for text in met):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            met[str(inputs)] = [_written(t) for t in tensors] if data else []


def _without_seed(text: str) -> str:
    return text.partition(", seed ")[0]


@contextmanager
def record(model: Callable[..., Any], *, data: bool = False) -> Iterator[Recording]:
    """Records the calls of autograd Functions, of the modules of a model, and of operators that are
    not PyTorch's own, while the block runs.

    Of each kind of inputs it keeps shapes, strides, dtypes, storage offsets, ``requires_grad``,
    bounds of integers, and the arguments that are not tensors; never the data, unless asked.

    Args:
        model: the module whose inner modules are watched as well; or any function.
        data: keep the tensors' data, too.

    Example::

        with testing.record(model) as seen:
            model(batch).sum().backward()
        seen.save("calls.json")  # custom-backprop validate pkg:Fn --recorded calls.json
        testing.validate(Fn.apply, seen.samples(Fn), reference)
    """
    seen = Recording()
    inside = 0

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal inside
        if inside:  # describing a tensor calls operators, too
            return
        inside += 1
        try:
            seen._add(name, args, kwargs, data)
        finally:
            inside -= 1

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        note(name_of(module), args, kwargs)

    with ExitStack() as watching:
        if isinstance(model, nn.Module):
            for module in model.modules():
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
                watching.callback(hook.remove)
        watching.enter_context(_Operators(note))
        watching.enter_context(_functions(note))
        yield seen


def name_of(value: Any) -> str:
    """The name under which it is recorded."""
    if isinstance(value, str):
        return value
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{str(value).removesuffix('.default')}"
    owner = getattr(value, "__self__", value)
    if isinstance(owner, nn.Module):
        owner = type(owner)
    return f"{owner.__module__}:{getattr(owner, '__qualname__', type(owner).__qualname__)}"


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in Recorder.STOCK:
            self.note(name_of(func), args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def _functions(note: Callable[..., None]) -> Iterator[None]:
    """Calls ``note`` at each ``Function.apply``, also where ``apply`` was taken from its class
    before: that is why the calls are watched, and nothing is patched."""
    code = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    before = sys.getprofile()

    def watch(frame: Any, event: Any, argument: Any) -> None:
        if event == "call" and frame.f_code is code:
            found = dict(frame.f_locals)
            note(name_of(found["cls"]), found["args"], found["kwargs"])
        if before is not None:
            before(frame, event, argument)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _written(t: Tensor) -> str:
    """The values, in order, whatever the strides."""
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(bytes(flat.tolist())).decode()


def _read(description: TensorOf, text: str, device: str | torch.device) -> Tensor:
    raw = bytearray(base64.b64decode(text))
    values = torch.frombuffer(raw, dtype=description.dtype) if raw else torch.empty(0)
    t = description.make(torch.Generator(), device).detach()
    once = t
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    values = values.to(description.dtype).reshape(t.shape)
    for dim in range(t.dim()):
        values = values.narrow(dim, 0, once.shape[dim])
    once.copy_(values)
    return t.requires_grad_(description.requires_grad)


def _sample(text: str, data: list[str], device: str | torch.device) -> Sample:
    inputs = Inputs.parse(text)
    if not data:
        return inputs.make(device)
    values = iter(data)

    def made(a: Any) -> Any:
        return _read(a, next(values), device) if isinstance(a, TensorOf) else a

    args = tuple(map(made, inputs.args))
    return Sample(args, {name: made(a) for name, a in inputs.kwargs.items()}, text)
