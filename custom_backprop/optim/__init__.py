"""Optimizers: drop-in subclasses of ``torch.optim``'s, whose step updates many parameters at
once. A name that we do not have is ``torch.optim``'s.

The constructors take torch's arguments, and three more:

Args:
    max_grad_norm: all gradients of this optimizer are multiplied by
        :func:`~custom_backprop.formulas.optim.clip_factor` of their total 2-norm, as
        ``clip_grad_norm_`` would do before the step. ``.grad`` itself does not change.
    master_weights: the update of a float16 or bfloat16 parameter uses a float32 copy, the
        ``master_param`` of its state. The parameter is rounded from it. All its state is float32.
    bf16_stochastic_round: bfloat16 parameters are updated in float32 and rounded up or down at
        random, more likely to the nearer number. There is no copy. Their state is float32. The
        noise depends on ``torch.manual_seed``.

Raises:
    ValueError: ``max_grad_norm`` is negative or NaN, or both kinds of rounding are requested, or
        one of these arguments is combined with ``differentiable=True``.
    RuntimeError: at a step with ``master_weights`` or ``bf16_stochastic_round``, if only torch's
        own update can take it: ``capturable``, sparse gradients, subclasses of Tensor.
"""

from typing import TYPE_CHECKING

import torch as _torch

from ..fallback import fall_back as _fall_back
from . import families as _families
from .families import *

__all__ = [name for name in vars(_families) if name[0].isalpha()]  # pytest adds some

if TYPE_CHECKING:
    # ours a second time: of two stars with one name mypy keeps the first, pyright the last
    from torch.optim import *  # type: ignore[assignment]

    from .families import *
else:
    __getattr__, __dir__ = _fall_back(__name__, _torch.optim)
