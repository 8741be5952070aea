"""What backpropagation costs, layer by layer, with stock's layers and with ours: flops, bytes
moved, bytes saved for backward.

``flops`` counts products (matrices, convolutions, attention), a multiplication and an addition as
two, by the formulas of ``torch.utils.flop_counter`` and those of our primitives. ``bytes`` counts
what the operators read and write: each argument and each result once, a view not at all. Where a
Triton kernel runs our operator, that is one operator; where ATen runs it, the calls beneath it
count. ``saved`` counts what autograd saves between forward and backward: each storage once, whole,
in the layer that saves it first. Parameters and buffers do not count, since they stay anyway.

A dispatch mode sees flops and bytes; it makes our ops call the dispatcher's operators. What is
saved is seen without a mode, and the calls of layers without hooks: the model does what it does in
training.
"""

from .measuring import cost, measure
from .report import Cost, CostReport, Layer

__all__ = ["Cost", "CostReport", "Layer", "cost", "measure"]
