"""All cases, section by section."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from custom_backprop.testing import OpSpec

from . import database, graphs, host, steps, sweep
from .case import Case
from .ceilings import Ceilings
from .device import Card
from .peers import Peer

#: of the time in which one case runs at a time
SHARES = {"sweep": 0.45, "database": 0.2, "steps": 0.15, "graphs": 0.12, "host": 0.08}


def sections(
    device: Card, specs: Sequence[OpSpec], found: Sequence[Peer], measured: Callable[[], Ceilings]
) -> dict[str, list[Case]]:
    """The cases of each section, the most important ones first."""
    return {
        "sweep": sweep.cases(device, specs, found, measured),
        "database": database.cases(device, specs),
        "steps": steps.cases(device),
        "graphs": graphs.cases(device, specs),
        "host": host.cases(device, specs),
    }
