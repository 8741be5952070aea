"""What is found, and how it prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

#: what a layer costs, and the heading of its columns
FIGURES = {
    "forward_flops": "flops forward",
    "backward_flops": "flops backward",
    "forward_bytes": "bytes forward",
    "backward_bytes": "bytes backward",
    "saved_bytes": "bytes saved",
}
LEGEND = (
    "flops: of products; bytes: read and written by the operators; saved: for backward, each "
    "storage once, without parameters"
)
MODEL, LOSS, OUTSIDE = "(model)", "(loss)", "(outside)"


@dataclass
class Layer:
    """One module's own cost, without that of the modules in it. ``kind`` is its class."""

    name: str
    kind: str = ""
    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    saved_bytes: int = 0

    def costs(self) -> bool:
        """Whether it has a figure at all: containers and what is never called have none."""
        return any(getattr(self, f) for f in ("parameters", *FIGURES))


@dataclass
class Cost:
    """The cost of one forward and one backward."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def total(self) -> Layer:
        sums = {
            f: sum(getattr(layer, f) for layer in self.layers) for f in ("parameters", *FIGURES)
        }
        return Layer("total", **sums)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers], "total": asdict(self.total)}


@dataclass
class CostReport:
    """What :func:`cost` found. Prints as a table."""

    name: str
    device: str
    stock: Cost
    ours: Cost

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "device": self.device,
            "stock": self.stock.to_dict(),
            "ours": self.ours.to_dict(),
        }

    def to_json(self, **options: Any) -> str:
        return json.dumps(self.to_dict(), **options)

    def __str__(self) -> str:
        pairs = [
            pair
            for pair in zip(self.stock.layers, self.ours.layers, strict=True)
            if any(layer.costs() for layer in pair)
        ]
        pairs.append((self.stock.total, self.ours.total))
        name, kind = (max(len(getattr(stock, of)) for stock, _ in pairs) for of in ("name", "kind"))
        start = f"{{:<{max(name, 5)}}}  {{:<{max(kind, 4)}}}  {{:>10}}"
        lines = [f"{self.name} on {self.device}"]
        lines.append(
            start.format("", "", "") + "".join(f"{title:>18}" for title in FIGURES.values())
        )
        lines.append(
            start.format("layer", "kind", "parameters") + f"{'stock':>11}{'ours':>7}" * len(FIGURES)
        )
        for stock, ours in pairs:
            figures = "".join(
                f"{_short(getattr(stock, f)):>11}{_short(getattr(ours, f)):>7}" for f in FIGURES
            )
            lines.append(start.format(stock.name, stock.kind, _short(stock.parameters)) + figures)
        return "\n".join([*lines, LEGEND])


def _short(n: float) -> str:
    """Four digits at most, and the prefix of a power of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if n < 999.5:
            return f"{n:.3g}{prefix}" if n < 99.5 else f"{n:.0f}{prefix}"
        n /= 1000
    return f"{n:.3g}P"
