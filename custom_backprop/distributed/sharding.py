"""What each primitive does with DTensors: which placements of its inputs give which of its outputs,
computed shard by shard.

A *way* holds for one dimension of the mesh: the placements of the outputs, and those of the tensors
that go in (None: not looked at). All replicated is a way of every op. Of an op's ways
:func:`_dispatch` takes the one that moves the fewest bytes. It sums partial inputs and cuts
replicated ones, as PyTorch's own operators do, but it gathers no sharded input of a forward pass:
what was sharded might not fit on one rank. It raises, and names the workaround.

With S(i) sharded along dimension i, R replicated, P a partial sum, and W (out, in), the linear
layer y = x Wᵀ + b goes three ways:

    rows      x S(i),  W R,    b R      ->  y S(i);     dy S(i)   ->  dx S(i),  dW P,    db P
    columns   x R,     W S(0), b S(0)   ->  y S(-1);    dy S(-1)  ->  dx P,     dW S(0), db S(0)
    inner     x S(-1), W S(1), b P      ->  y P;        dy R      ->  dx S(-1), dW S(1), db R

Under ``create_graph=True`` no primitive runs but a formula, of PyTorch's operators, which know
DTensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..backends.library import LIBRARY, PRIMITIVES
from ..formulas.activation import ACTIVATIONS
from ..formulas.cross_entropy import GRADIENT, STATISTICS
from ..formulas.loss import LOSSES, MEAN, NONE
from ..formulas.softmax import SOFTMAXES

Way = tuple[Sequence[Placement], Sequence[Placement | None]]
Ways = Callable[..., Iterable[Way]]

R, P, S = Replicate(), Partial(), Shard


def _elementwise(outputs: int, inputs: int) -> Ways:
    """All of the shape of the first."""
    return lambda x, *rest: (([S(i)] * outputs, [S(i)] * inputs) for i in range(x.dim()))


def _softmax(x: Tensor, dim: int, dtype: Any) -> Iterable[Way]:
    return (([S(i)], [S(i)]) for i in range(x.dim()) if i != dim)


def _softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: Any) -> Iterable[Way]:
    return (([S(i)], [S(i), S(i)]) for i in range(y.dim()) if i != dim)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterable[Way]:
    last = x.dim() - 1
    yield from (([S(i)], [S(i), R, R]) for i in range(last))
    yield [S(last)], [R, S(0), S(0)]
    yield [P], [S(last), S(1), P]


def _linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: Any
) -> Iterable[Way]:
    """Without the inner way: f of a partial sum is no part of f of the sum."""
    kept = not ACTIVATIONS[activation].saves_output
    return (([y, y if kept else R], inputs) for (y,), inputs in _linear(x, weight, bias) if y != P)


def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> Iterable[Way]:
    last = dy.dim() - 1

    def way(
        y: Placement, in_x: Placement, in_w: Placement, dx: Placement, dw: Placement, db: Placement
    ) -> Way:
        outputs = [
            g if need else R for g, need in ((dx, need_x), (dw, need_weight), (db, need_bias))
        ]
        return outputs, [
            y,
            in_x if need_weight else None,
            in_w if need_x else None,
        ]  # dx reads the weight, dW the input

    yield from (way(S(i), S(i), R, S(i), P, P) for i in range(last))
    yield way(S(last), R, S(0), P, S(0), S(0))
    yield way(R, S(last), S(1), S(last), S(1), R)


def _linear_activation_backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, *rest: Any
) -> Iterable[Way]:
    return (
        (outputs, [*inputs, inputs[0]])
        for outputs, inputs in _linear_backward(dy, x, weight, *rest[-3:])
    )


def _prelu(x: Tensor, weight: Tensor) -> Iterable[Way]:
    return (([S(i)], [S(i), S(0) if i == 1 and weight.numel() > 1 else R]) for i in range(x.dim()))


def _prelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> Iterable[Way]:
    for (s,), (_, w) in _prelu(x, weight):
        dw = S(0) if w == S(0) else P
        yield [s if need_x else R, dw if need_weight else R], [s, s, w]


def _like(t: Tensor | None, x: Tensor, i: int) -> Placement:
    """S(i), if the tensor is as large there as x."""
    return S(i) if t is not None and t.shape == x.shape else R


def _loss(x: Tensor, *rest: Any) -> Iterable[Way]:
    """A mean divides by the count of all shards, which no shard knows."""
    *tensors, reduction, hold = rest[:5]
    if reduction != MEAN:
        for i in range(x.dim()):
            yield (
                [S(i) if reduction == NONE else P, S(i) if hold else R],
                [S(i), *(_like(t, x, i) for t in tensors)],
            )


def _loss_backward(dy: Tensor, x: Tensor, *rest: Any) -> Iterable[Way]:
    *tensors, reduction, needs = rest[:5]
    if reduction != MEAN:
        for i in range(x.dim()):
            inputs = [S(i), *(_like(t, x, i) for t in tensors)]
            grads = [
                (P if p == R else p) if need else R for p, need in zip(inputs, needs, strict=True)
            ]
            yield grads, [S(i) if reduction == NONE else R, *inputs]


def _rows(x: Tensor, target: Tensor) -> Iterable[tuple[int, Placement]]:
    """The dimensions of x but that of the classes, and the target's placement."""
    same = target.dim() == x.dim()
    return ((i, S(i if same or i == 0 else i - 1)) for i in range(x.dim()) if i != 1)


def _row(i: int) -> Placement:
    """That of one number a row: dimension i without that of the classes."""
    return S(max(i - 1, 0))


def _nll(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *rest: Any
) -> Iterable[Way]:
    if reduction != MEAN:
        for i, t in _rows(x, target):
            yield [_row(i) if reduction == NONE else P, P], [S(i), t, R]


def _nll_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    *rest: Any,
) -> Iterable[Way]:
    if reduction != MEAN:
        for i, t in _rows(x, target):
            yield (
                [S(i)],
                [_row(i) if reduction == NONE else R, S(i), t, R, None],
            )  # only a mean reads the total


def _statistics(i: int) -> Placement:
    """(2, N, ...)"""
    return S(max(i, 1))


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *rest: Any
) -> Iterable[Way]:
    keep = rest[-1]
    if reduction != MEAN:
        for i, t in _rows(x, target):
            kept = {GRADIENT: S(i), STATISTICS: _statistics(i)}.get(keep, R)
            yield [_row(i) if reduction == NONE else P, kept], [S(i), t, R]


def _cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    *rest: Any,
) -> Iterable[Way]:
    *_, need_x, need_target = rest
    if reduction != MEAN:
        for i, t in _rows(x, target):
            outputs = [S(i) if need_x else R, t if need_target else R]
            yield outputs, [_row(i) if reduction == NONE else R, S(i), t, R, _statistics(i)]


def _triplet(a: Tensor, p: Tensor, n: Tensor, *options: Any) -> Iterable[Way]:
    """The distances are (2, ...) or (3, ...), for a of shape (..., D)."""
    if (reduction := options[-1]) != MEAN:
        for i in range(a.dim() - 1):
            yield [S(i) if reduction == NONE else P, S(i + 1)], [S(i)] * 3


def _triplet_backward(
    dy: Tensor, a: Tensor, p: Tensor, n: Tensor, d: Tensor, *options: Any
) -> Iterable[Way]:
    *_, reduction, needs = options
    if reduction != MEAN:
        for i in range(a.dim() - 1):
            yield (
                [S(i) if need else R for need in needs],
                [S(i) if reduction == NONE else R, *[S(i)] * 3, S(i + 1)],
            )


def _unit(x: Tensor, eps: float) -> Iterable[Way]:
    return (([S(i), S(i)], [S(i)]) for i in range(x.dim() - 1))


def _unit_backward(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Iterable[Way]:
    return (([S(i)], [S(i)] * 3) for i in range(y.dim() - 1))


def _scale(grad: Tensor, dy: Tensor) -> Iterable[Way]:
    return (([S(i)], [S(i), R]) for i in range(grad.dim()))


#: name of the primitive -> its ways, beside all replicated. One that is not here has no other
WAYS: dict[str, Ways] = {
    **{f"{name}_forward": _elementwise(1, 1) for name in ACTIVATIONS},
    **{f"{name}_forward_": _elementwise(0, 1) for name in ACTIVATIONS},
    **{f"{name}_backward": _elementwise(1, 2) for name in ACTIVATIONS},
    **{f"{name}_forward": _softmax for name in SOFTMAXES},
    **{f"{name}_backward": _softmax_backward for name in SOFTMAXES},
    **{f"{name}_forward": _loss for name in LOSSES},
    **{f"{name}_backward": _loss_backward for name in LOSSES},
    "linear_forward": _linear,
    "linear_backward": _linear_backward,
    "linear_activation_forward": _linear_activation,
    "linear_activation_backward": _linear_activation_backward,
    "prelu_forward": _prelu,
    "prelu_backward": _prelu_backward,
    "nll_loss_forward": _nll,
    "nll_loss_backward": _nll_backward,
    "cross_entropy_forward": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "triplet_forward": _triplet,
    "triplet_backward": _triplet_backward,
    "unit_forward": _unit,
    "unit_backward": _unit_backward,
    "scale": _scale,
    "scale_": lambda grad, dy: (([], inputs) for _, inputs in _scale(grad, dy)),
}


def _dispatch(
    cls: type, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None
) -> Any:
    """The rule of every primitive for DTensor: the inputs placed, the operator on the shards, the
    outputs put together."""
    tensors = [a for a in args if isinstance(a, DTensor)]
    if any(isinstance(a, Tensor) and not isinstance(a, DTensor) for a in args):
        raise RuntimeError(
            f"{operator}: got torch.Tensor beside DTensor: make a DTensor of each (DTensor.from_local, distribute_tensor)"
        )
    mesh = tensors[0].device_mesh
    if any(t.device_mesh != mesh for t in tensors):
        raise RuntimeError(
            f"{operator}: the DTensors lie on different meshes: {', '.join(str(t.device_mesh) for t in tensors)}"
        )
    if operator is PRIMITIVES["linear_activation_forward"] and _is_inner(*args[:2]):
        return _linear_then_activation(*args)
    ways = [_cheapest(operator, args, i) for i in range(mesh.ndim)]
    results = operator(*map(_placed, args, _by_tensor(ways, 1, len(args))))
    whole = operator(*map(_shape_of, args))
    outputs = _by_tensor(ways, 0, len(operator._schema.returns))
    if isinstance(whole, Tensor):
        return _assembled(results, whole, mesh, outputs[0])
    return (
        tuple(_assembled(r, w, mesh, p) for r, w, p in zip(results, whole, outputs, strict=True))
        if whole
        else None
    )


def _by_tensor(ways: list[Way], side: int, count: int) -> list[tuple[Placement | None, ...]]:
    """The placements of each tensor, one a dimension of the mesh, from those of each dimension; ()
    for what is no tensor."""
    known = list(zip(*(way[side] for way in ways), strict=True))
    return known + [()] * (count - len(known))


def _cheapest(operator: Any, args: tuple[Any, ...], dim: int) -> Way:
    """The way that moves the fewest bytes along dimension ``dim`` of the mesh; of those, the one
    that leaves most as it is.

    Raises:
        NotImplementedError: each would gather what is sharded.
    """
    name, inputs = (
        operator._schema.name.partition("::")[2],
        [a for a in operator._schema.arguments if "Tensor" in str(a.type)],
    )
    everywhere: Way = [R] * len(operator._schema.returns), [R] * len(inputs)
    gathers, in_place = name.endswith("_backward") or name == "scale", name.endswith("_")
    best, least = None, (torch.inf, 0)
    for way in (*WAYS.get(name, lambda *args: ())(*args), everywhere):
        moved, changed = 0.0, 0
        for t, want in zip(args, way[1], strict=False):
            if isinstance(t, DTensor) and want is not None and (have := t.placements[dim]) != want:
                changed += 1
                if in_place or not (gathers or have.is_partial() or have.is_replicate()):
                    moved = torch.inf
                elif not have.is_replicate():
                    moved += t.nbytes
        if (moved, changed) < least:
            best, least = way, (moved, changed)
    if best is None:
        raise NotImplementedError(_refusal(name, [a for a in args if isinstance(a, DTensor)]))
    return best


def _refusal(name: str, tensors: list[DTensor]) -> str:
    given = ", ".join(f"{tuple(t.shape)} {t.placements}" for t in tensors)
    ways_out = "redistribute or gather it first (x.redistribute(placements=[Replicate()]), x.full_tensor()), or call it on x.to_local()"
    if name.startswith(("cross_entropy", "nll_loss")) and any(
        p.is_shard(1) for p in tensors[0].placements
    ):
        ways_out += "; for classes spread over ranks: custom_backprop.distributed.vocab_parallel_cross_entropy(x.to_local(), ...)"
    elif name == "info_nce":
        ways_out = (
            "every query meets every key: redistribute them (x.redistribute(placements=[Replicate()]), x.full_tensor()); on x.to_local() "
            "it is another loss, with no negatives but this rank's"
        )
    elif "_loss" in name or "entropy" in name or name.startswith(("kl_div", "triplet")):
        ways_out += "; for a mean: reduction='sum', divided by the count"
    return f"{name} cannot be computed shard by shard of inputs placed so: {given}; {ways_out}"


def _placed(a: Any, placements: tuple[Placement | None, ...]) -> Any:
    """What the operator sees of an argument on this rank. Where a replicated one becomes partial,
    it stands on the first rank alone."""
    if not isinstance(a, DTensor):
        return a
    pairs = [
        (have, have if want is None else want)
        for have, want in zip(a.placements, placements, strict=True)
    ]
    once = [i for i, (have, want) in enumerate(pairs) if have.is_replicate() and want.is_partial()]
    # detached: below autograd, torch 2.11 redistributes nothing that requires grad
    plain: Any = a.detach()
    local = plain.redistribute(
        placements=[R if i in once else want for i, (_, want) in enumerate(pairs)]
    ).to_local()
    return torch.zeros_like(local) if any(a.device_mesh.get_local_rank(i) for i in once) else local


def _shape_of(a: Any) -> Any:
    """A tensor that has the shape of the whole DTensor and no data: run on it, the operator tells
    the shapes of whole outputs."""
    return (
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, DTensor)
        else a
    )


def _assembled(result: Tensor, whole: Tensor, mesh: Any, placements: Sequence[Any]) -> DTensor:
    return DTensor.from_local(
        result, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _is_inner(x: DTensor, weight: DTensor) -> bool:
    return any(p.is_shard(x.dim() - 1) for p in x.placements) or any(
        p.is_shard(1) for p in weight.placements
    )


def _linear_then_activation(
    x: DTensor, weight: DTensor, bias: DTensor | None, activation: str, parameters: Any
) -> tuple[Tensor, Tensor]:
    """The inner way with the sum in the middle, where it belongs. Backward is as for one
    Function."""
    z = PRIMITIVES["linear_forward"](x, weight, bias)
    z = z.redistribute(placements=[R if p.is_partial() else p for p in z.placements])
    y = PRIMITIVES[f"{activation}_forward"](z, *parameters)
    return y, z.to_local().new_empty(0) if ACTIVATIONS[activation].saves_output else z


for _operator in PRIMITIVES.values():
    torch.library.register_torch_dispatch(_operator.name(), DTensor, _dispatch, lib=LIBRARY)
