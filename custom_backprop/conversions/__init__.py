"""How an existing model is made to run ours: what :func:`custom_backprop.convert` is made of.

``torch.nn`` and what was registered go by a table of exact classes. The modules of others that are
known here have one file a family, with a function ``counterpart(module)``. It returns a class; or a
reason, in words, why such a module stays; or None if it knows nothing of the module.
"""

from __future__ import annotations

import torch

from .. import nn
from . import activation, linear, mlp, norm
from .generated import made_of

#: torch's class -> ours
DROP_INS: dict[type, type] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}

#: why most modules stay
NO_COUNTERPART = "no counterpart here"

#: families of modules of others
FAMILIES = (activation, linear, mlp, norm)


def is_ours(cls: type) -> bool:
    """Whether ``revert`` has a class to give back for this one."""
    return theirs_of(cls) is not cls


def theirs_of(cls: type) -> type:
    """The class that a module had before its conversion."""
    while (parts := made_of(cls)) is not None:
        cls = parts[0]
    return next((theirs for theirs, ours in DROP_INS.items() if ours is cls), cls)


def counterpart(module: torch.nn.Module, cls: type) -> type | str:
    """The class of ours that stands for this module of the class ``cls``, or why there is none."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if cls in DROP_INS:
        return DROP_INS[cls]
    for theirs in cls.__mro__[1:]:
        if theirs in DROP_INS:
            own = cls.forward is not theirs.forward  # type: ignore[attr-defined]
            return f"a subclass of {theirs.__name__}" + " with a forward of its own" * own
    found = (family.counterpart(module) for family in FAMILIES)
    return next((answer for answer in found if answer is not None), NO_COUNTERPART)
