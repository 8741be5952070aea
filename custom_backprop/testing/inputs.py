"""The inputs of a call as text: ``f32[8,16] requires_grad, i64[8] < 16, eps=1e-5``.

The grammar, by example. Items stand between commas; ``name=`` before one makes it a keyword
argument:

==============================  ==================================================================
``f32[8,16]``                   a tensor; dtypes are f64 f32 bf16 f16 i64 i32 i16 i8 u8 bool, and
                                ``f32[]`` has no dimensions
``f32[8] requires_grad``        one that is differentiated
``f32[8] in 0..1``              drawn from 0 <= x < 1; default: -3..3, integers 0..2
``i64[8] < 16``                 integers 0 <= x < 16
``f32[8,16] transposed``        the last dimension has the largest stride
``f32[8,16] sliced``            every second element of a buffer
``f32[8,16] expanded``          the first dimension has stride 0
``f32[8,16] strides(32,1)``     any strides
``f32[8,16] offset 3``          it begins three elements into its storage
``2``, ``1e-5``, ``'mean'``     a value of Python: numbers, strings, None, True, False, tuples and
``None``, ``(3, 4)``            lists of them
``torch.float32``               a dtype of torch
``seed 3``                      other random numbers; default: seed 0
==============================  ==================================================================
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .spec import Sample

#: the grammar's name of a dtype -> the dtype
DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class InputsError(ValueError):
    """The text does not describe inputs. The message points at the character where that
    shows."""


@dataclass(frozen=True)
class TensorOf:
    """A tensor without its values.

    Attributes:
        dtype, shape, requires_grad: its own.
        low, high: the values are drawn from [low, high). None: -3 to 3; for integers 0 to 2.
        strides: None for a contiguous tensor.
        offset: the index of its first element in its storage.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool = False
    low: float | None = None
    high: float | None = None
    strides: tuple[int, ...] | None = None
    offset: int = 0

    @classmethod
    def of(cls, t: Tensor) -> TensorOf:
        """The description of a tensor. Its bounds are kept if they say more than the default: for
        integers both, for floating-point numbers that there are none below 0, or above 3 in
        magnitude."""
        low = high = None
        if t.numel() and t.dtype != torch.bool and not t.is_meta:
            least, most = t.detach().min().item(), t.detach().max().item()
            if not t.is_floating_point():
                low, high = min(least, 0), most + 1
            elif math.isfinite(least) and math.isfinite(most) and (least >= 0 or most <= 0):
                low, high = _three_digits(least), _three_digits(most)
                high = high if high > low else low + 1
        return cls(
            t.dtype,
            tuple(t.shape),
            t.requires_grad,
            low,
            high,
            None if t.is_contiguous() else t.stride(),
            int(t.storage_offset()),
        )

    def make(self, generator: torch.Generator, device: str | torch.device = "cpu") -> Tensor:
        """Such a tensor. The values are drawn on the CPU."""
        strides = contiguous(self.shape) if self.strides is None else self.strides
        length = self.offset
        if math.prod(self.shape):
            length += 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        low, high = self._bounds()
        if self.dtype.is_floating_point:
            storage = torch.empty(length, dtype=torch.float64)
            storage = storage.uniform_(low, high, generator=generator).to(self.dtype)
        else:
            storage = torch.randint(int(low), int(high), (length,), generator=generator)
            storage = storage.to(self.dtype)
        t = storage.to(device).as_strided(self.shape, strides, self.offset)
        return t.requires_grad_(self.requires_grad)

    def _bounds(self) -> tuple[float, float]:
        low, high = (-3.0, 3.0) if self.dtype.is_floating_point else (0, 2)
        return low if self.low is None else self.low, high if self.high is None else self.high

    def __str__(self) -> str:
        words = [f"{NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"]
        if self.requires_grad:
            words.append("requires_grad")
        if (self.low, self.high) != (None, None):
            low, high = self._bounds()
            integers = not self.dtype.is_floating_point
            bounds = f"{_short(low)}..{_short(high)}"
            words.append(f"< {high}" if integers and low == 0 else f"in {bounds}")
        if self.strides is not None and self.strides != contiguous(self.shape):
            words.append(f"strides({','.join(map(str, self.strides))})")
        if self.offset:
            words.append(f"offset {self.offset}")
        return " ".join(words)


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call; each tensor is a :class:`TensorOf`.

    ``Inputs.parse("f32[8,16] requires_grad, i64[8] < 16")`` reads one, and ``str`` writes it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Inputs:
        """Reads the grammar of :mod:`custom_backprop.testing.inputs`.

        Raises:
            InputsError: the text is not in it.
        """
        return _Reader(text).inputs()

    @classmethod
    def of(cls, sample: Sample, seed: int = 0) -> Inputs:
        """A sample without its values.

        Raises:
            ValueError: it has a tensor of a dtype, or an object, that the grammar cannot write.
        """
        args = tuple(map(_described, sample.args))
        return cls(args, {name: _described(a) for name, a in sample.kwargs.items()}, seed)

    def make(self, device: str | torch.device = "cpu") -> Sample:
        """Such arguments, with random values."""
        generator = torch.Generator().manual_seed(self.seed)

        def made(a: Any) -> Any:
            return a.make(generator, device) if isinstance(a, TensorOf) else a

        args, kwargs = tree_map(made, (self.args, self.kwargs))
        return Sample(args, kwargs, str(self))

    def __str__(self) -> str:
        items = [_written(a) for a in self.args]
        items += [f"{name}={_written(a)}" for name, a in self.kwargs.items()]
        return ", ".join(items + [f"seed {self.seed}"] * (self.seed != 0))

    def smaller(self) -> Iterator[Inputs]:
        """Simpler ones of the same kind: a size becomes 1, a half or one less, wherever it stands
        (as a size, a bound of integers or a number among the arguments); layouts become
        contiguous."""
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, TensorOf)]
        sizes = sorted({n for t in tensors for n in t.shape if n > 1}, reverse=True)
        for n in sizes:
            for m in dict.fromkeys((1, n // 2, n - 1)):
                yield self._map(partial(_resized, n=n, m=m))
        for i, t in enumerate(tensors):
            for dim, n in enumerate(t.shape):
                if n > 1:
                    shape = (*t.shape[:dim], 1, *t.shape[dim + 1 :])
                    yield self._with(i, replace(t, shape=shape))
        if any(t.strides is not None or t.offset for t in tensors):
            yield self._map(_contiguous)

    def _map(self, change: Callable[[Any], Any]) -> Inputs:
        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def _with(self, which: int, tensor: TensorOf) -> Inputs:
        """With another description of one of the tensors, which are counted."""
        number = count()
        return self._map(
            lambda a: tensor if isinstance(a, TensorOf) and next(number) == which else a
        )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, stride = [], 1
    for n in reversed(shape):
        strides.append(stride)
        stride *= max(n, 1)
    return tuple(reversed(strides))


def _three_digits(x: float) -> float:
    return float(f"{x:.3g}")


def _short(x: float) -> str:
    return str(int(x)) if x == int(x) else repr(x)


def _contiguous(a: Any) -> Any:
    return replace(a, strides=None, offset=0) if isinstance(a, TensorOf) else a


def _resized(a: Any, n: int, m: int) -> Any:
    """The argument with m for n. Strides keep their order, and are dense."""
    if not isinstance(a, TensorOf):
        return m if type(a) is int and a == n else a
    shape = tuple(m if size == n else size for size in a.shape)
    high = m if a.high == n and not a.dtype.is_floating_point else a.high
    strides = a.strides
    if strides is not None and shape != a.shape:
        order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
        dense = contiguous(tuple(shape[i] for i in order))
        strides = tuple(dense[order.index(i)] * (s > 0) for i, s in enumerate(strides))
    return replace(a, shape=shape, high=high, strides=strides)


def _described(a: Any) -> Any:
    if isinstance(a, Tensor):
        if a.dtype not in NAMES:
            raise ValueError(f"tensors of {a.dtype} cannot be described")
        return TensorOf.of(a)
    if all(isinstance(x, PLAIN) for x in tree_leaves(a, is_leaf=lambda x: x is None)):
        return a
    raise ValueError(f"an argument of type {type(a).__name__} cannot be described")


def _written(a: Any) -> str:
    if isinstance(a, TensorOf | torch.dtype):
        return str(a)
    if isinstance(a, tuple):
        return f"({', '.join(map(_written, a))}{',' * (len(a) == 1)})"
    if isinstance(a, list):
        return f"[{', '.join(map(_written, a))}]"
    return repr(a)


class _Reader:
    """Reads the grammar from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def inputs(self) -> Inputs:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        seed = 0
        while True:
            start = self._skip()
            if self._take(r"seed\s+"):
                seed = int(self._expect(r"\d+", "a seed, such as seed 3"))
            elif name := self._take(r"[A-Za-z_]\w*(?=\s*=[^=])"):
                self._expect("=", "=")
                if name in kwargs:
                    self._fail(f"{name} is given twice", start)
                kwargs[name] = self._value()
            elif kwargs:
                self._fail("a positional argument after one by keyword", start)
            else:
                args.append(self._value())
            if self._skip() == len(self.text):
                return Inputs(tuple(args), kwargs, seed)
            self._expect(",", "a comma, or one of the words " + WORDS)

    def _value(self) -> Any:
        start = self._skip()
        if prefix := self._take(rf"(?:{'|'.join(DTYPES)})(?=\s*\[)"):
            return self._tensor(DTYPES[prefix], start)
        if unknown := self._take(r"[A-Za-z]\w*(?=\s*\[)"):
            self._fail(f"no dtype {unknown}; there are {' '.join(DTYPES)}", start)
        if name := self._take(r"torch\.\w+"):
            if not isinstance(dtype := getattr(torch, name[6:], None), torch.dtype):
                self._fail(f"{name} is not a dtype", start)
            return dtype
        source = self._literal()
        if source in ("true", "false"):
            source = source.capitalize()
        if re.fullmatch(r"-?(inf|nan)", source):
            return float(source)
        try:
            return ast.literal_eval(source)
        except (ValueError, SyntaxError):
            self._fail("expected a tensor, such as f32[8,16], or a value of Python", start)

    def _literal(self) -> str:
        """The text up to the next comma that is in no bracket and no string."""
        start, depth, quote = self.at, 0, ""
        for at, c in enumerate(self.text[start:], start):
            if quote:
                quote = "" if c == quote else quote
            elif c in "'\"":
                quote = c
            elif c in "([":
                depth += 1
            elif c in ")]":
                depth -= 1
            elif c == "," and depth == 0:
                self.at = at
                return self.text[start:at].strip()
        self.at = len(self.text)
        return self.text[start:].strip()

    def _tensor(self, dtype: torch.dtype, start: int) -> TensorOf:
        t = TensorOf(dtype, self._integers("[", "]", "size"))
        while True:
            at = self._skip()
            if self._take(r"requires_grad\b"):
                if not dtype.is_floating_point:
                    self._fail(f"a tensor of {NAMES[dtype]} has no gradient", at)
                t = replace(t, requires_grad=True)
            elif self._take("<"):
                if dtype.is_floating_point or dtype == torch.bool:
                    self._fail("< bounds integers; for others write: in 0..1", at)
                t = replace(t, low=0, high=self._bounded(0, int(self._number("-?\\d+")), at))
            elif self._take(r"in\b"):
                number = r"-?\d+" if not dtype.is_floating_point else NUMBER
                low = self._number(number)
                self._expect(r"\.\.", ".. between two bounds, such as 0..1")
                t = replace(t, low=low, high=self._bounded(low, self._number(number), at))
            elif word := self._take(r"(?:transposed|sliced|expanded)\b"):
                t = replace(t, strides=_layout(word, t.shape))
            elif self._take(r"strides\b"):
                strides = self._integers("(", ")", "stride")
                if len(strides) != len(t.shape):
                    self._fail(f"{len(strides)} strides for {len(t.shape)} sizes", at)
                t = replace(t, strides=strides)
            elif self._take(r"offset\b"):
                t = replace(t, offset=int(self._expect(r"\d+", "an offset, such as offset 3")))
            elif unknown := self._take(r"\w+"):
                self._fail(f"no word {unknown}; there are {WORDS}", at)
            else:
                return t

    def _integers(self, opening: str, closing: str, what: str) -> tuple[int, ...]:
        self._expect(re.escape(opening), opening)
        found: list[int] = []
        while not self._take(re.escape(closing)):
            if found:
                self._expect(",", f"a comma or {closing}")
            found.append(int(self._expect(r"\d+", f"a {what}, which is an integer")))
        return tuple(found)

    def _number(self, pattern: str) -> Any:
        text = self._expect(pattern, "an integer" if pattern != NUMBER else "a number")
        return int(text) if pattern != NUMBER else float(text)

    def _bounded(self, low: Any, high: Any, at: int) -> Any:
        return high if low < high else self._fail(f"no number is between {low} and {high}", at)

    def _skip(self) -> int:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at

    def _take(self, pattern: str) -> str:
        """The text that matches here, behind white space; empty if it does not."""
        self._skip()
        match = re.compile(pattern).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match.group().strip() if match else ""

    def _expect(self, pattern: str, what: str) -> str:
        return self._take(pattern) or self._fail(f"expected {what}", self._skip())

    def _fail(self, message: str, at: int) -> NoReturn:
        raise InputsError(f"{message}\n  {self.text}\n  {' ' * at}^")


#: what stands for itself in the text
PLAIN = (type(None), bool, int, float, str, torch.dtype)

NUMBER = r"-?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
WORDS = "requires_grad, <, in, transposed, sliced, expanded, strides, offset"


def _layout(word: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if word == "transposed":
        return tuple(reversed(contiguous(tuple(reversed(shape)))))
    if word == "sliced":
        return tuple(2 * s for s in contiguous(shape))
    return (0, *contiguous(shape)[1:]) if shape else ()


def samples_of(inputs: Any) -> list[Sample] | None:
    """The calls that ``inputs`` of :func:`~custom_backprop.testing.validate` describes: a text, a
    sample, :class:`Inputs`, keyword arguments, or a list of them. None if it is the arguments of
    one call."""
    if isinstance(inputs, str):
        return [Inputs.parse(inputs).make()]
    if isinstance(inputs, Inputs):
        return [inputs.make()]
    if isinstance(inputs, Sample):
        return [inputs]
    if isinstance(inputs, dict):
        return [Sample((), inputs)]
    several = isinstance(inputs, list | tuple) and inputs
    if several and all(isinstance(i, str | Inputs | Sample | dict) for i in inputs):
        return [sample for i in inputs for sample in samples_of(i) or ()]
    return None
