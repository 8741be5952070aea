"""Our ops among many processes: DTensor (tensor parallel), and a cross-entropy whose classes are
spread over the ranks.

DDP and FSDP2 need nothing of this: they move parameters and gradients, and no op sees it. A DTensor
does reach the op. ``sharding.py`` tells PyTorch what each primitive does with one, so that
``parallelize_module`` takes our layers; the first op that meets a DTensor imports it.
"""

from . import sharding
from .cross_entropy import vocab_parallel_cross_entropy

__all__ = ["sharding", "vocab_parallel_cross_entropy"]
