"""What the shared code needs to know about one optimizer's update rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: in ``triton_kernels/optim.py``.
        formula: in ``formulas/optim.py``.
        states: the lists that torch's ``_init_group`` fills after parameters and gradients, by the
            names of the states.
        packed: the states that have to be adjacent in memory on a CPU.
    """

    name: str
    formula: Callable[..., Any]
    states: tuple[str, ...]
    packed: tuple[str, ...] = ()

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The states in the order of the kernels."""
        return tuple(name for name in self.states if name != "step")

    @cached_property
    def counts_steps(self) -> bool:
        """Whether the formula depends on the number of steps made."""
        return "t" in self._keywords

    @cached_property
    def hyper(self) -> tuple[str, ...]:
        """The hyperparameters that the formula takes."""
        return tuple(name for name in self._keywords if name not in ("t", "fresh"))

    @cached_property
    def _keywords(self) -> list[str]:
        parameters = inspect.signature(self.formula).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
