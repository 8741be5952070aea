"""What a project needs to write ops of its own the way this one does: see ``docs/validate.md``."""

from .backends.library import fold_batch, primitive
from .ops.function import differentiable

__all__ = ["differentiable", "fold_batch", "primitive"]
