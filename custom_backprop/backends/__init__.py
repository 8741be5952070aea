"""Registers each primitive with PyTorch's dispatcher: CPU -> ATen, CUDA -> Triton kernels, Meta ->
shapes, and a vmap rule."""

from .library import PRIMITIVES
from .selection import BACKENDS, get_backend, interpreting, use_backend, why_not

__all__ = ["BACKENDS", "PRIMITIVES", "get_backend", "interpreting", "use_backend", "why_not"]
