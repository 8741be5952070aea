"""What a check raises if what it saw is not right, and what its exceptions mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .case import Case

    CheckFunction = TypeVar("CheckFunction", bound=Callable[[Case], Any])


class Wrong(AssertionError):
    """A result is wrong, or something was changed that must not be.

    Args:
        reason: what is wrong.
        script: a program that shows it.
    """

    def __init__(self, reason: str = "", script: str = "") -> None:
        super().__init__(reason)
        self.script = script


class NotOffered(Exception):
    """The code refuses, clearly, what the check asks of it.

    Args:
        reason: what it refuses, and how.
        found: what the check would have returned, of what the code does offer.
        script: a program that shows it.
    """

    def __init__(self, reason: str, found: Any = None, script: str = "") -> None:
        super().__init__(reason)
        self.found, self.script = found, script


class NotRun(Exception):
    """This machine, or this sample, cannot tell, or not all of it."""


class NotApplicable(Exception):
    """The check says nothing about this case."""


#: checks of what code may do without, such as a second derivative or forward mode: if it raises an
#: exception there, that is "not offered". In any other check it is "wrong"
FEATURES: set[str] = set()

#: checks that the database runs on the first sample alone where ATen does not run: how an op is
#: called and traced differs little from backend to backend, second derivatives and tangents are
#: formulas on all of them, and some checks are slow in the interpreter
FIRST_SAMPLE: set[str] = set()

#: checks of the Triton kernels that somebody launches; ours have the command ``kernels``
OF_KERNELS: set[str] = set()

#: checks that draw inputs of their own, like those of the case: of an op's samples one is enough
SEARCHED: set[str] = set()


#: checks that take a second: the database runs them on the first sample of representative ops, with
#: ATen
COSTLY: set[str] = set()

#: checks of the samples and not of the code: it is enough if one sample passes, with ATen
ENOUGH = {"mutations"}


def _adds_to(names: set[str]) -> Callable[[CheckFunction], CheckFunction]:
    def mark(function: CheckFunction) -> CheckFunction:
        names.add(function.__name__)
        return function

    return mark


# decorators of checks
feature, first_sample, of_kernels, searched, costly = map(
    _adds_to, (FEATURES, FIRST_SAMPLE, OF_KERNELS, SEARCHED, COSTLY)
)
