"""A picture of a backward pass: the autograd graph behind a loss, with each node's formula, what it
holds in memory, and the gradient that flows through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reading import Verdict
from .flow import measure
from .graph import Edge, Flow, Node, Saved, in_order, number_text, read, size_text
from .marks import mark, verdicts
from .page import page
from .svg import Drawing

__all__ = ["Edge", "Flow", "Node", "Picture", "Saved", "draw"]


@dataclass(frozen=True)
class Picture:
    """What :func:`draw` found. A notebook shows it.

    Attributes:
        title: the heading.
        nodes: the data, in the order in which backward runs.
        verdicts: what a :class:`~custom_backprop.monitor.GradientMonitor` would say of it.
    """

    title: str
    nodes: tuple[Node, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def saved_bytes(self) -> int:
        """What the graph holds for backward: each storage once, without parameters and buffers."""
        return sum(node.bytes for node in self.nodes)

    @property
    def svg(self) -> str:
        """A picture, in one file."""
        return self._drawing.svg(self.title, self._lines())

    @property
    def html(self) -> str:
        """A page to explore, in one file that needs no network: zoom, search, and all data of the
        node that is clicked."""
        return page(self._drawing, self.title, self._lines(), self.nodes)

    def save(self, path: str | Path) -> None:
        """Writes the page to a path that ends with ".html", the picture to one with ".svg".

        Raises:
            ValueError: the path has another ending.
        """
        path = Path(path)
        kinds = {".html": "html", ".svg": "svg"}
        if path.suffix not in kinds:
            raise ValueError(f"the path must end with .html or .svg, got {str(path)!r}")
        path.write_text(getattr(self, kinds[path.suffix]), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "nodes": [{**asdict(node), "bytes": node.bytes} for node in self.nodes],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def __str__(self) -> str:
        return "\n".join([self.title, *self._lines()])

    def _repr_html_(self) -> str:
        frame = "width:100%;height:640px;border:0"
        return f'<iframe style="{frame}" srcdoc="{escape(self.html)}"></iframe>'

    @cached_property
    def _drawing(self) -> Drawing:
        return Drawing(self.nodes)

    def _lines(self) -> list[str]:
        leaves = [n for n in self.nodes if n.kind == "leaf" and n.flow is not None]
        line = f"{len(self.nodes)} nodes · {size_text(self.saved_bytes)} saved for backward"
        if leaves:
            norms = [leaf.flow.norm for leaf in leaves if leaf.flow]
            line += f" · ‖∂L/∂w‖ from {number_text(min(norms))} to {number_text(max(norms))}"
        return [line, *(f"{v.kind} in {v.layer!r}: {v.evidence}" for v in self.verdicts)]


def draw(
    loss: Tensor,
    model: nn.Module | None = None,
    names: Mapping[str, Tensor] | None = None,
    *,
    gradients: bool = True,
    title: str | None = None,
) -> Picture:
    """Draws the graph that ``loss.backward()`` would run through, and the gradients on their way.

    They are measured by a backward that this function itself runs. It changes nothing: no leaf gets
    a gradient, the graph stays, random numbers are put back. What hooks on tensors do, they do here
    too. Gradients are coloured by the rules of :class:`~custom_backprop.monitor.GradientMonitor`.

    Args:
        loss: a tensor with one element.
        model: its parameters' names name the leaves.
        names: further names, of leaves or of any tensor on the way.
        gradients: False reads the graph and runs nothing.
        title: the heading; by default the model's class, or the loss's node.

    Raises:
        ValueError: ``loss`` has several elements, or does not require grad.
        RuntimeError: backward cannot run twice: the graph was freed, or a part of it is compiled
            with donated buffers, or checkpointed with ``use_reentrant=True``.

    Example:
        >>> loss = torch.nn.functional.mse_loss(model(x), y)
        >>> custom_backprop.monitor.draw(loss, model).save("backward.html")
    """
    if not loss.requires_grad:
        raise ValueError("the loss does not require grad: there is no graph to draw")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must have one element, got shape {tuple(loss.shape)}: draw(loss.sum())"
        )
    order = in_order(torch.autograd.graph.get_gradient_edge(loss).node)
    nodes = read(order, model, names)
    found: list[Verdict] = []
    if gradients:
        try:
            measure(loss, order, nodes)
        except RuntimeError as error:
            if remedy := next((r for key, r in REMEDIES.items() if key in str(error)), None):
                raise RuntimeError(f"{remedy}; or draw(loss, gradients=False)") from error
            raise
        mark(nodes)
        found = verdicts(nodes)
    name = nodes[0].name if model is None else type(model).__name__
    return Picture(title or f"Backward pass of {name}", tuple(nodes), tuple(found))


#: what torch says when a backward cannot run, and what can be done
REMEDIES = {
    "a second time": "the graph was freed: draw(loss) before loss.backward(), or call "
    "loss.backward(retain_graph=True)",
    "donated buffers": "a compiled region can run backward only once: set "
    "torch._functorch.config.donated_buffer = False before torch.compile",
    "use_reentrant=True": "a checkpoint hides its leaves: pass it use_reentrant=False",
}
