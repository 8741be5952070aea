"""Triton kernels and their launchers, one file an op family. They know tensors, not autograd and
not modules.

Imported as ``custom_backprop.triton_kernels`` (see ``custom_backprop/backends/kernels.py``), and
only when a kernel is wanted.
"""

import os

# triton 3.9 warns while this is unset, and its default changes in 3.10: the kernels were checked
# with fused multiply-add allowed.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
