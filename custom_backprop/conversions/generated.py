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

#: class -> what it was made of. A dictionary, because a compiler looks into it
_MADE: dict[type, tuple[type, Members]] = {}


@functools.cache
def subclass(base: type, members: Members) -> type:
    """The subclass of ``base`` with the attributes ``members(base)``; the same one at each call."""
    described = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    made = type(base.__name__, (base,), described | members(base))
    refuse(made)
    _MADE[made] = base, members
    return made


def made_of(cls: type) -> tuple[type, Members] | None:
    """The arguments of :func:`subclass` that gave exactly ``cls``, or None."""
    return _MADE.get(cls)


def _reduce(self: Any, protocol: int) -> Any:
    """What theirs has to say, with the class named by what was made of it, one after another. A
    class that somebody derived from a made one stands for itself."""
    its = (vars(c).get("__reduce_ex__", _reduce) for c in type(self).__mro__)
    made, arguments, *rest = next(r for r in its if r is not _reduce)(self, max(protocol, 2))
    base, steps = type(self), list[Members]()
    while (parts := made_of(base)) is not None:
        base, members = parts
        steps.insert(0, members)
    if steps and made is copyreg.__newobj__:  # type: ignore[attr-defined]
        made, arguments = _new, (base, tuple(steps), *arguments[1:])
    return made, arguments, *rest


def _new(base: type, steps: tuple[Members, ...], *arguments: Any) -> Any:
    for members in steps:
        base = subclass(base, members)
    made: Any = base
    return made.__new__(made, *arguments)
