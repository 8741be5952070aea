"""The flops and bytes of operators."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..backends.library import OPERATORS
from ..backends.selection import backend_for
from .where import Where

_aten = torch.ops.aten
#: attention on a CPU, of which torch's counter has no formula of its own (torch 2.13)
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Counter(TorchDispatchMode):
    """Adds every operator's flops and bytes to the layer at work."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if (key := _beneath(func, args)) is not None:
                return func._op_dk(key, *args, **kwargs)
            if _composite(func) and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        direction = "backward" if self.where.in_backward() else "forward"
        layer = self.where.layer()
        for figure, value in (
            (f"{direction}_flops", flops),
            (f"{direction}_bytes", _moved(func, args, kwargs, out)),
        ):
            setattr(layer, figure, getattr(layer, figure) + value)
        return out


def _composite(func: Any) -> bool:
    """Whether it may be no more than the calls that it makes; silu_backward, say, could be written
    so and yet is one operator."""
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


def _beneath(func: Any, args: tuple[Any, ...]) -> DispatchKey | None:
    """The key of the implementation whose calls are to be counted in place of ``func``, an operator
    of ours; None if it counts itself."""
    if func not in OPERATORS:
        return None
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    key = {"cpu": DispatchKey.CPU, "cuda": DispatchKey.CUDA}.get(device)
    return None if key is None or backend_for(device) == "triton" else key


#: operators that write their first argument without reading it
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes read and written."""
    schema = func._schema
    if schema.name.startswith(("aten::empty", "aten::new_empty")):
        return 0
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    mutated = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    known = set(map(address, tensors(given)))
    written = tensors([given.get(a.name) for a in mutated]) + [
        t for t in tensors(out) if address(t) not in known
    ]
    if not written:  # a view
        return 0
    takes_a_shape = schema.name.startswith("aten::new_") or schema.name.endswith("_like")
    if takes_a_shape:
        return sum(map(_bytes, written))
    unread = {a.name for a in mutated if a.kwarg_only or schema.name in OVERWRITES}
    read = tensors([value for name, value in given.items() if name not in unread])
    return sum(map(_bytes, written + read))


def tensors(tree: Any) -> list[Tensor]:
    """Each once."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values())


def address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    """Those of the elements that are there: an expanded dimension is one element."""
    return t.element_size() * prod(
        n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n
    )
