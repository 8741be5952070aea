"""Optimizers: drop-in subclasses of ``torch.optim``'s, whose step updates many parameters at
once. A name that we do not have is ``torch.optim``'s."""

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
