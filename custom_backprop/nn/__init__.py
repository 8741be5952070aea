"""Drop-in modules: subclasses of the ``torch.nn`` class that override only ``forward``. One file
per family of ops. A name that we do not have is ``torch.nn``'s: ``import custom_backprop.nn as nn``
takes the place of ``import torch.nn as nn``."""

from typing import TYPE_CHECKING

import torch as _torch

from ..fallback import fall_back as _fall_back
from . import families as _families
from . import functional as functional
from . import utils as utils
from .families import *
from .refuse import refuse as _refuse

__all__ = [name for name in vars(_families) if name[0].isalpha()]  # pytest adds some

for _name in __all__:
    _refuse(globals()[_name])

if TYPE_CHECKING:
    # ours a second time: of two stars with one name mypy keeps the first, pyright the last
    from torch.nn import *  # type: ignore[assignment, no-redef]

    from . import functional as functional
    from . import utils as utils
    from .families import *
else:
    __getattr__, __dir__ = _fall_back(__name__, _torch.nn)
