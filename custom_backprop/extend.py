"""What a project needs to write ops of its own the way this one does: see ``docs/kernels.md``."""

from .backends.library import fold_batch, primitive
from .formulas.precision import rounded_once
from .ops.route import Definition, op

__all__ = ["Definition", "fold_batch", "op", "primitive", "rounded_once"]
