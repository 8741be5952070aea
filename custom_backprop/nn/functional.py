"""``import custom_backprop.nn.functional as F``: the module :mod:`custom_backprop.functional`, by
the name that it has in torch."""

import sys
from typing import TYPE_CHECKING

from .. import functional

if TYPE_CHECKING:
    from ..functional.families import *  # isort: skip
    from torch.nn.functional import *  # type: ignore[assignment]

    from ..functional.families import *

sys.modules[__name__] = functional
