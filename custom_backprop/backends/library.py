"""Every primitive is an operator of PyTorch's dispatcher.

A primitive has one schema and up to three implementations: ``formula`` (the mathematics, always
there), ``aten`` (the quickest calls of PyTorch's own operators; the formula where none is given)
and ``triton`` (a launcher of kernels). The dispatcher then does what an if/else of ours could not:
fake tensors, ``torch.compile``, ``vmap``, autocast and modes meet an operator like any other.

What else PyTorch wants to know of an operator is a field of the primitive: shapes, vmap, sharding,
flops, what a compiler sees. No list elsewhere knows its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from .flops import count
from .kernels import kernels
from .selection import backend_for

LIBRARY = torch.library.Library("custom_backprop", "DEF")

#: name -> the primitive, in the order of definition
PRIMITIVES: dict[str, Primitive] = {}

#: operator -> its primitive, those of other projects' libraries too
OPERATORS: dict[torch._ops.OpOverload, Primitive] = {}

#: How a tensor lies on the ranks along one dimension of a mesh: replicated, a partial sum, or cut
#: along dimension i, which is the number i itself.
R, P = "R", "P"
Placement = int | str
#: (placements of the outputs, placements of the tensors that go in; None: not looked at)
Sharding = tuple[Sequence[Placement], Sequence[Placement | None]]

_AUTOCAST = {
    "AutocastCPU": DispatchKeySet(DispatchKey.AutocastCPU),
    "AutocastCUDA": DispatchKeySet(DispatchKey.AutocastCUDA),
}


class Primitive:
    """One operator and its implementations, each a function of the operator's arguments.

    Attributes:
        operator: what PyTorch's dispatcher calls. Calling the primitive calls this.
        formula, aten, triton: the implementations.
        traced, exported: what a compiler is shown, and an exporter, which is shown no kernel.
        sharding: see :func:`primitive`.
    """

    def __init__(self, operator: torch._ops.OpOverload, **fields: Any) -> None:
        self.operator = operator
        self.formula: Callable[..., Any] = fields["formula"]
        self.aten: Callable[..., Any] = fields["aten"] or self.formula
        self._triton: Callable[..., Any] = fields["triton"]
        self.sharding: Callable[..., Iterable[Sharding]] = fields["sharding"] or (lambda *args: ())
        shown = fields["traced"]
        self._shown = shown if shown in ("kernel", "operator") else None
        self.exported: Callable[..., Any] = self.formula if self._shown else shown or self.formula
        self.traced = self._operator_or_formula if self._shown else self.exported

    @cached_property
    def triton(self) -> Callable[..., Any]:
        return self._triton.found if isinstance(self._triton, launcher) else self._triton

    def __call__(self, *args: Any) -> Any:
        return self.operator(*args)

    def is_traced_whole(self, x: torch.Tensor) -> bool:
        """Whether a compiler sees the operator of such a tensor, and not what is inside."""
        return self._shown == "operator" or (self._shown == "kernel" and x.is_cuda)

    def _operator_or_formula(self, first: torch.Tensor, *rest: Any) -> Any:
        return (self.operator if self.is_traced_whole(first) else self.formula)(first, *rest)


def primitive(
    schema: str,
    *,
    formula: Callable[..., Any],
    triton: Callable[..., Any],
    aten: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    traced: Callable[..., Any] | str | None = None,
    sharding: Callable[..., Iterable[Sharding]] | None = None,
    flops: Callable[..., int] | None = None,
    library: torch.library.Library = LIBRARY,
) -> Primitive:
    """Defines one primitive and registers its implementations.

    An implementation takes the schema's arguments, and their types stand there: a private one, and
    what it calls with them, is written without annotations. It may return None for a result that
    was not asked for; the operator, which must return a tensor, then returns an empty one.

    Args:
        schema: the operator's schema, without the library's name.
        formula: plain torch with the schema's signature and results. It also serves where nothing
            better is given.
        triton: the launcher of the kernels, usually ``launcher(family, name)``, so that triton is
            imported at the first use.
        aten: the same by PyTorch's operators, for the CPU.
        fake: the results' shapes, dtypes and strides on fake tensors. Default: the formula, which
            runs on them as well.
        vmap: ``vmap(info, in_dims, *args) -> (result, out_dims)``. Default: the formula, on batched
            tensors.
        traced: what ``torch.compile`` sees. Default: the formula, so that Inductor can fuse it.
            ``"kernel"``: on a GPU the operator, where the kernel beats what the compiler makes.
            ``"operator"``: the operator, on a CPU too.
        sharding: ``sharding(*args)`` yields what may be computed shard by shard: see
            :data:`Sharding`. All replicated is always allowed.
        flops: those of its matrix products, from the shapes of its arguments.
        library: where it is defined; a project that builds on this one passes a library of its own.
    """
    name = schema[: schema.index("(")]
    library.define(schema)
    operator = getattr(getattr(torch.ops, library.ns), name).default
    made = Primitive(
        operator, formula=formula, aten=aten, triton=triton, traced=traced, sharding=sharding
    )
    by_formula = _filled(formula)
    library.impl(name, _filled(lambda *args: getattr(made, backend_for("cpu"))(*args)), "CPU")
    library.impl(name, _filled(lambda *args: getattr(made, backend_for("cuda"))(*args)), "CUDA")
    for key, keyset in _AUTOCAST.items():
        library.impl(name, _without_autocast(operator, keyset), key)
    torch.library.register_fake(f"{library.ns}::{name}", _filled(fake or formula), lib=library)
    library.impl(name, _with_autograd(operator, by_formula), "Autograd", with_keyset=True)
    if vmap is None:  # a vmap inside register_vmap's rule fails in functorch
        library.impl(name, by_formula, "FuncTorchBatched")
    else:
        torch.library.register_vmap(f"{library.ns}::{name}", vmap, lib=library)
    if flops is not None:
        count(operator, flops)
    OPERATORS[operator] = made
    if library is LIBRARY:
        PRIMITIVES[name] = made
    return made


def builtin(packet: Any, overload: str = "default") -> Callable[..., Any]:
    """An overload of one of PyTorch's operators, without the Python of its call."""
    return getattr(packet, overload)._op


class launcher:
    """The launcher ``name`` of ``triton_kernels/<family>.py``, imported when it is called, with
    ``first`` before its other arguments."""

    def __init__(self, family: str, name: str, *first: Any) -> None:
        self._named = family, name, first

    @cached_property
    def found(self) -> Callable[..., Any]:
        """What is called, without the Python of :class:`launcher`."""
        family, name, first = self._named
        function = getattr(kernels(family), name)
        return partial(function, *first) if first else function

    def __call__(self, *args: Any) -> Any:
        return self.found(*args)


def fold_batch(
    tensors: tuple[torch.Tensor | None, ...], in_dims: tuple[Any, ...], size: int
) -> list[torch.Tensor | None]:
    """Moves each tensor's batch dimension to the front, and gives one (of stride 0) to those that
    have none."""
    return [
        None if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]


def slices(count: int, width: int, size: int) -> Iterator[slice]:
    """``count`` rows of ``width`` numbers each, cut into chunks of about ``size`` numbers."""
    step = max(1, size // max(width, 1))
    return (slice(i, i + step) for i in range(0, count, step))


def empty_if(needed: bool, t: torch.Tensor) -> torch.Tensor | None:
    """Memory for a gradient of ``t``, or None if nobody needs it."""
    return torch.empty_like(t) if needed else None


def _filled(run: Callable[..., Any]) -> Callable[..., Any]:
    """With an empty tensor for each None: an operator returns tensors."""

    def call(*args: Any) -> Any:
        results = run(*args)
        if type(results) is not tuple or not any(r is None for r in results):
            return results
        like = next(a for a in args if isinstance(a, torch.Tensor))
        return tuple([like.new_empty(0) if r is None else r for r in results])

    return call


def _without_autocast(operator: torch._ops.OpOverload, keyset: DispatchKeySet) -> Callable:
    """Casts are made once, above autograd (see ``ops/route.py``): what a primitive calls must not
    cast again."""

    def run(*args: Any) -> Any:
        with _ExcludeDispatchKeyGuard(keyset):
            return operator(*args)

    return run


def _with_autograd(
    operator: torch._ops.OpOverload, formula: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator that is called without the Function around it is differentiated by its
    formula."""

    def run(keys: DispatchKeySet, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        watched = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if watched or any(_tangent(t) is not None for t in tensors):
            return formula(*args)
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return run


def _tangent(t: torch.Tensor) -> torch.Tensor | None:
    """What forward mode carries beside ``t``. (A compiled graph opens its level without Python's
    knowledge.)"""
    return torch._VF._unpack_dual(t, level=0)[1]  # type: ignore[attr-defined]
