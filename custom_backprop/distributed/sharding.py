"""How primitives run on DTensors: shard by shard.

A primitive's field ``sharding`` yields pairs of placements, of its inputs and of the resulting
outputs, for one dimension of the mesh. All replicated is allowed for every op. :func:`_dispatch`
takes the pair that moves the fewest bytes. It sums partial inputs and splits replicated ones, as
PyTorch's own operators do. But in a forward pass it never gathers a sharded input, which might not
fit on one rank. It raises instead, and says what to do.

Under ``create_graph=True`` no primitive runs, but a formula. It consists of PyTorch's operators,
which know DTensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .. import functional  # noqa: F401 (it defines every primitive)
from ..backends.library import LIBRARY, OPERATORS, PRIMITIVES
from ..formulas.activation import ACTIVATIONS

#: placements of the outputs, and of the input tensors (None: any)
Layout = tuple[Sequence[Placement], Sequence[Placement | None]]

_PLACEMENTS = {"R": Replicate(), "P": Partial(), None: None}


def _layouts(operator: Any, args: tuple[Any, ...]) -> list[Layout]:
    """The layouts of the primitive's ``sharding``, as PyTorch's placements, and all replicated."""
    tensors = [a for a in operator._schema.arguments if "Tensor" in str(a.type)]
    everywhere = ["R"] * len(operator._schema.returns), ["R"] * len(tensors)
    found: list[Any] = [*OPERATORS[operator].sharding(*args), everywhere]
    return [([*map(_placement, y)], [*map(_placement, x)]) for y, x in found]


def _placement(name: Any) -> Any:
    return Shard(name) if isinstance(name, int) else _PLACEMENTS[name]


def _dispatch(
    cls: type, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None
) -> Any:
    """The rule of every primitive for DTensor: places the inputs, runs the operator on the shards,
    and assembles the outputs."""
    tensors = [a for a in args if isinstance(a, DTensor)]
    if any(isinstance(a, Tensor) and not isinstance(a, DTensor) for a in args):
        raise RuntimeError(
            f"{operator}: got torch.Tensor and DTensor: make all of them DTensors "
            "(DTensor.from_local, distribute_tensor)"
        )
    mesh = tensors[0].device_mesh
    if any(t.device_mesh != mesh for t in tensors):
        meshes = ", ".join(str(t.device_mesh) for t in tensors)
        raise RuntimeError(f"{operator}: the DTensors are on different meshes: {meshes}")
    if operator is PRIMITIVES["linear_activation_forward"].operator and _is_inner(*args[:2]):
        return _linear_then_activation(*args)
    layouts = [_cheapest(operator, args, i) for i in range(mesh.ndim)]
    results = operator(*map(_placed, args, _by_tensor(layouts, 1, len(args))))
    whole = operator(*map(_shape_of, args))
    outputs = _by_tensor(layouts, 0, len(operator._schema.returns))
    if isinstance(whole, Tensor):
        return _assembled(results, whole, mesh, outputs[0])
    return (
        tuple(_assembled(r, w, mesh, p) for r, w, p in zip(results, whole, outputs, strict=True))
        if whole
        else None
    )


def _by_tensor(layouts: list[Layout], side: int, count: int) -> list[tuple[Placement | None, ...]]:
    """The placements of each tensor, one per dimension of the mesh, from those of each dimension.
    () for what is not a tensor."""
    known = list(zip(*(layout[side] for layout in layouts), strict=True))
    return known + [()] * (count - len(known))


def _cheapest(operator: Any, args: tuple[Any, ...], dim: int) -> Layout:
    """The layout that moves the fewest bytes along dimension ``dim`` of the mesh. Among equal ones,
    the one that changes the fewest placements.

    Raises:
        NotImplementedError: every layout would gather a sharded tensor.
    """
    name = operator._schema.name.partition("::")[2]
    gathers, in_place = name.endswith("_backward") or name == "scale", name.endswith("_")
    best, least = None, (torch.inf, 0)
    for layout in _layouts(operator, args):
        moved, changed = 0.0, 0
        for t, want in zip(args, layout[1], strict=False):
            if isinstance(t, DTensor) and want is not None and (have := t.placements[dim]) != want:
                changed += 1
                if in_place or not (gathers or have.is_partial() or have.is_replicate()):
                    moved = torch.inf
                elif not have.is_replicate():
                    moved += t.nbytes
        if (moved, changed) < least:
            best, least = layout, (moved, changed)
    if best is None:
        raise NotImplementedError(_refusal(name, [a for a in args if isinstance(a, DTensor)]))
    return best


def _refusal(name: str, tensors: list[DTensor]) -> str:
    given = ", ".join(f"{tuple(t.shape)} {t.placements}" for t in tensors)
    gathered = "x.redistribute(placements=[Replicate()]), x.full_tensor()"
    advice = f"redistribute or gather it first ({gathered}), or call it on x.to_local()"
    if name.startswith(("cross_entropy", "nll_loss")) and any(
        p.is_shard(1) for p in tensors[0].placements
    ):
        advice += (
            "; for classes sharded over ranks: "
            "custom_backprop.distributed.vocab_parallel_cross_entropy(x.to_local(), ...)"
        )
    elif name.startswith("info_nce"):
        advice = (
            f"every query is compared with every key: redistribute them ({gathered}); on "
            "x.to_local() it is another loss, with only this rank's negatives"
        )
    elif "_loss" in name or "entropy" in name or name.startswith(("kl_div", "triplet")):
        advice += "; for a mean: reduction='sum', divided by the count"
    return (
        f"{name} cannot be computed shard by shard for inputs placed like this: {given}; {advice}"
    )


def _placed(a: Any, placements: tuple[Placement | None, ...]) -> Any:
    """The local part of an argument, which the operator gets. If a replicated argument becomes
    partial, only the first rank has its value."""
    if not isinstance(a, DTensor):
        return a
    pairs = [
        (have, have if want is None else want)
        for have, want in zip(a.placements, placements, strict=True)
    ]
    once = [i for i, (have, want) in enumerate(pairs) if have.is_replicate() and want.is_partial()]
    # detached: below autograd, torch 2.11 does not redistribute tensors that require grad
    plain: Any = a.detach()
    local = plain.redistribute(
        placements=[Replicate() if i in once else want for i, (_, want) in enumerate(pairs)]
    ).to_local()
    return torch.zeros_like(local) if any(a.device_mesh.get_local_rank(i) for i in once) else local


def _shape_of(a: Any) -> Any:
    """A tensor with the shape of the whole DTensor and no data. The operator, run on it, gives the
    shapes of the whole outputs."""
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
    """The op sharded along the inner dimension: the sum over the ranks comes before the activation.
    Backward is as for one Function."""
    z = PRIMITIVES["linear_forward"](x, weight, bias)
    z = z.redistribute(placements=[Replicate() if p.is_partial() else p for p in z.placements])
    y = PRIMITIVES[f"{activation}_forward"](z, *parameters)
    return y, z.to_local().new_empty(0) if ACTIVATIONS[activation].saves_output else z


for _primitive in PRIMITIVES.values():
    torch.library.register_torch_dispatch(
        _primitive.operator.name(), DTensor, _dispatch, lib=LIBRARY
    )
