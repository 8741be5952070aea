"""Triton kernels of any project on a machine without a GPU, launched by that project's own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import arithmetic, gpu, kernels

_active = 0


@contextmanager
def interpreted(*, pretend_cuda: bool = False) -> Iterator[None]:
    """Inside, every ``@triton.jit`` kernel runs in Triton's interpreter, on CPU tensors.

    ``TRITON_INTERPRET`` need not be set: kernels that were decorated for a GPU run here too, so the
    same process can also compile them offline. Nothing remains patched afterwards.

    What a launch needs of a GPU is stood in for:

    - ``@triton.autotune`` takes the first configuration that runs, after the kernel's own pruning;
      hooks, ``reset_to_zero`` and ``restore_value`` are honoured. Nothing is timed.
      ``@triton.heuristics`` works as it is.
    - The functions of libdevice are NumPy's.
    - A float argument is rounded to float32, as a compiled kernel gets it.
    - bfloat16 is computed in float32 and rounded to nearest even (the interpreter's own arithmetic
      sees its bit patterns as integers).
    - ``torch.cuda.device``, ``current_device``, ``get_device_properties`` and the like, and
      ``triton.runtime.driver.active``, answer for a GPU of compute capability 8.0 with few
      multiprocessors, so that every program of a persistent kernel has several turns.

    What it cannot do: inline assembly, TMA's multicast, warp specialisation, Gluon and CUDA C++ do
    not run; a kernel that waits for another program waits for ever, because programs run one after
    the other; ``tl.dot`` computes float32 in float32, where a GPU may take TF32; a sum of bfloat16
    is rounded once; the accuracy of ``exp`` and the like is NumPy's, not the GPU's. So it shows
    what a kernel computes and which memory it accesses, not how fast it is, nor its last bits.

    Args:
        pretend_cuda: also answer that there is a GPU (``torch.cuda.is_available()``,
            ``tensor.is_cuda``), and make what is asked for on "cuda" on the CPU: for code that
            refuses to run, or to be imported, without one. ``tensor.device`` cannot be changed.

    The setting belongs to the process, because autograd runs backward on threads of its own.

    Raises:
        RuntimeError: the package triton is not installed.

    Example::

        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        with interpreted():
            y = LigerRMSNormFunction.apply(x, weight, 1e-6)
            y.sum().backward()
    """
    global _active
    kernels.require_triton()
    with ExitStack() as patches:
        if not _active:
            for stand_in in (arithmetic.patched, kernels.patched, gpu.patched):
                patches.enter_context(stand_in())
        if pretend_cuda:
            patches.enter_context(gpu.pretended())
        _active += 1
        try:
            yield
        finally:
            _active -= 1


def is_interpreted() -> bool:
    """Whether the code runs inside :func:`interpreted`."""
    return _active > 0


__all__ = ["interpreted", "is_interpreted"]
