"""Watches the gradients of a training run: which layers learn, which have stopped learning, and
what to do about it.

By the chain rule the gradient at layer l is a product with the Jacobians of all layers after it,
∂L/∂a_l = J_{l+1}ᵀ ... J_Lᵀ ∂L/∂a_L. It shrinks or grows geometrically with depth, unless each
factor preserves its length. ``docs/gradients.md`` has the mathematics and the pictures.
"""

from __future__ import annotations

from .judge import falls, judge
from .picture import Picture, draw
from .reading import CURES, Layer, Reading, Verdict
from .watch import GradientMonitor
from .writers import JSONLines, TensorBoard, Writer

__all__ = [
    "CURES",
    "GradientMonitor",
    "JSONLines",
    "Layer",
    "Picture",
    "Reading",
    "TensorBoard",
    "Verdict",
    "Writer",
    "draw",
    "falls",
    "judge",
]
