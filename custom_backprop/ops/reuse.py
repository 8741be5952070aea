"""Gradients written over a saved output that nobody needs any more.

Once its graph is freed, the memory of a saved output goes back to the allocator, while the gradient, as large, comes from it: on a CPU the
page faults of that new memory take longer than the arithmetic. Where this node is the last that holds the output, its gradient takes its
place.
"""

from __future__ import annotations

from sys import getrefcount

import torch
from torch import Tensor

#: the fewest elements for which to ask costs less than it saves
LEAST = 2**15

#: what holds the storage of an output that this node alone has kept: the saved tensor, the one unpacked from it, and the storage asked
_HOLDERS = 3

#: to the Python object of that storage: ours, that of the C++ object, and the argument of getrefcount
_REFERENCES = 3

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_use_count = torch._C._storage_Use_Count


def reusable(output: Tensor) -> bool:
    """Whether backward may ask :func:`is_spare` of this output, which forward saves: no hook on saved tensors gets to see it."""
    return output.numel() >= LEAST and _hooks(True) is None


def is_spare(saved: Tensor) -> bool:
    """Whether no tensor but ``saved``, unpacked from a saved output, shares its memory, and no backward will ask for it again."""
    if _keeps_graph():
        return False
    storage = saved.untyped_storage()
    return _use_count(storage._cdata) == _HOLDERS and getrefcount(storage) <= _REFERENCES and not storage.is_shared()
