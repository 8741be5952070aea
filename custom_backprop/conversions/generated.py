"""Subclasses made from a class that is already there, for a module that is to run another forward
and stay the same in all else.

``module.__class__ = subclass(type(module), members)`` changes nothing that the module holds. The
new class has the name of its base, so that printing and saving show no difference, and its objects
can be copied and pickled, although no module holds the class under that name.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from ..nn.refuse import refuse

#: base -> the attributes of its subclass. A function of a module, because pickle refers to it
Members = Callable[[type], dict[str, Any]]


@functools.cache
def subclass(base: type, members: Members) -> type:
    """The subclass of ``base`` with the attributes ``members(base)``; the same one at each call."""
    described = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_made_of": (base, members),
    }
    made = type(base.__name__, (base,), described | members(base))
    refuse(made)
    return made


def made_of(cls: type) -> tuple[type, Members] | None:
    """The arguments of :func:`subclass` that gave exactly ``cls``, or None."""
    return vars(cls).get("_made_of")


def _reduce(self: Any, protocol: int) -> Any:
    """What the base has to say, with the class named by what it was made of."""
    base, members = self._made_of
    made, arguments, *rest = base.__reduce_ex__(self, max(protocol, 2))
    if made is copyreg.__newobj__:  # type: ignore[attr-defined]
        made, arguments = _new, (base, members, *arguments[1:])
    return made, arguments, *rest


def _new(base: type, members: Members, *arguments: Any) -> Any:
    made: Any = subclass(base, members)
    return made.__new__(made, *arguments)
