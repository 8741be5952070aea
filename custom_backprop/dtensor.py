"""DTensors as what lies under them, without the import of torch.distributed.tensor, which takes
longer than that of all else here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_dtensor(t: Any) -> bool:
    return hasattr(t, "to_local")


def local(t: Any) -> Tensor:
    """The part of a DTensor on this rank; any other tensor itself."""
    return t.to_local() if is_dtensor(t) else t
