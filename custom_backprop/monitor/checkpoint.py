"""What a monitor saves: the number of steps, its history, and the current window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from .outputs import Outputs
from .reading import Layer, Reading, Verdict
from .window import Window


def saved(
    steps: int, history: Iterable[Reading], window: Window, outputs: Outputs
) -> dict[str, Any]:
    """Plain containers and tensors, which ``torch.load(weights_only=True)`` accepts."""
    return {
        "steps": steps,
        "history": [asdict(reading) for reading in history],
        "window": {
            "table": None if window.table is None else window.table.clone(),
            "alive": dict(window.alive),
            "ranges": dict(outputs.ranges),
            "passed": list(outputs.passed),
        },
    }


def readings(state: dict[str, Any]) -> Iterator[Reading]:
    """The history in what :func:`saved` returned."""
    for r in state["history"]:
        layers = tuple(Layer(**layer) for layer in r["layers"])
        verdicts = tuple(Verdict(**verdict) for verdict in r["verdicts"])
        yield Reading(**{**r, "layers": layers, "verdicts": verdicts})


def restore(state: dict[str, Any], window: Window, outputs: Outputs, device: torch.device) -> None:
    """Restores the current window from what :func:`saved` returned."""
    open_ = state["window"]
    window.table = None if open_["table"] is None else open_["table"].to(device)
    window.alive = {row: (t.to(device), share) for row, (t, share) in open_["alive"].items()}
    outputs.ranges = {
        stage: (least.to(device), most.to(device))
        for stage, (least, most) in open_["ranges"].items()
    }
    outputs.passed = set(open_["passed"])
