"""Our ops in several processes: DTensor (tensor parallel), a cross-entropy whose classes are
sharded over the ranks, and a batch normalization of all their batches.

Otherwise DDP and FSDP2 do not need this: they move parameters and gradients, and ops do not notice.
A DTensor does reach an op. ``sharding.py`` tells PyTorch what each primitive does with one, so that
``parallelize_module`` works on our layers. The first op that gets a DTensor imports it.
"""

from . import sharding
from .batch_norm import sync_batch_norm
from .cross_entropy import vocab_parallel_cross_entropy

__all__ = ["sharding", "sync_batch_norm", "vocab_parallel_cross_entropy"]
