"""The result of one window of steps: the total, the layers, and what is wrong with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property

CURES = {
    "vanishing": "initialise for the activation (custom_backprop.init.init_for), use one that "
    "does not saturate, or normalise between layers",
    "exploding": "clip the norm (custom_backprop.nn.utils.clip_grad_norm_), lower the learning "
    "rate, or initialise for the activation (custom_backprop.init.init_for)",
    "dead units": "lower the learning rate, start the biases at 0, or use an activation with a "
    "slope everywhere (leaky_relu, elu, gelu)",
    "non-finite": "lower the learning rate, clip the norm "
    "(custom_backprop.nn.utils.clip_grad_norm_) or normalise; "
    "torch.autograd.set_detect_anomaly(True) names the op",
}


@dataclass(frozen=True)
class Verdict:
    """What is wrong, in which layer, the evidence, and the cure."""

    kind: str
    layer: str
    evidence: str

    @property
    def cure(self) -> str:
        return CURES[self.kind]

    def __str__(self) -> str:
        return f"{self.kind} in {self.layer!r}: {self.evidence}. Cure: {self.cure}"


@dataclass(frozen=True)
class Layer:
    """One module over the measured steps of a reading, with all of its own parameters together. A
    value is None if it was not measured, or does not exist.

    Attributes:
        norm: that of the gradient: the root of the mean square over the steps in which it was
            finite; NaN if it never was.
        mean, std, zeros, nonfinite: those of the gradient's elements; the last two are fractions.
        dead: the fraction of output units that got no gradient at all in any measured step and,
            where outputs are measured, were silent in all of them: of one value, or under a
            function never above 0.
        activation_*: the same of the module's output, of this rank.
        update: ‖Δw‖ / ‖w‖ of one optimizer step.
    """

    name: str
    norm: float | None = None
    mean: float | None = None
    std: float | None = None
    zeros: float | None = None
    nonfinite: float | None = None
    dead: float | None = None
    activation_mean: float | None = None
    activation_std: float | None = None
    activation_zeros: float | None = None
    activation_nonfinite: float | None = None
    update: float | None = None


@dataclass(frozen=True)
class Reading:
    """The result of one window of steps. It prints the total and the verdicts; :meth:`table` prints
    the layers.

    Attributes:
        step: the number of the window's last step, counted from 1.
        norm: that of the whole gradient.
        update: ‖Δw‖ / ‖w‖ of the whole model.
    """

    step: int
    norm: float
    update: float | None
    layers: tuple[Layer, ...]
    verdicts: tuple[Verdict, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> Layer:
        if name not in self._by_name:
            raise KeyError(f"no layer {name!r}; there are: {', '.join(self._by_name)}")
        return self._by_name[name]

    def __str__(self) -> str:
        update = "" if self.update is None else f", update / weight {self.update:.1e}"
        return "\n  ".join(
            [f"step {self.step}: gradient norm {self.norm:.3g}{update}", *map(str, self.verdicts)]
        )

    def table(self) -> str:
        """One line per layer."""
        keys = [f.name for f in fields(Layer)][1:]
        width = max(len(layer.name) for layer in self.layers)
        lines = [" ".join([" " * width, *(f"{k.replace('activation', 'act'):>13}" for k in keys)])]
        for layer in self.layers:
            cells = (getattr(layer, k) for k in keys)
            lines.append(
                " ".join(
                    [
                        f"{layer.name:{width}}",
                        *(f"{'-' if c is None else format(c, '.3g'):>13}" for c in cells),
                    ]
                )
            )
        return "\n".join(lines)

    def scalars(self, layers: bool) -> dict[str, float]:
        """Everything that was measured, by name: the totals, and with ``layers`` also
        ``layer/statistic``."""
        found = {"norm": self.norm, "update": self.update}
        for layer in self.layers if layers else ():
            found |= {f"{layer.name}/{k}": v for k, v in asdict(layer).items() if k != "name"}
        return {k: v for k, v in found.items() if v is not None}


def in_order(layers: tuple[Layer, ...], called: list[int]) -> tuple[Layer, ...]:
    """Layers in the order of the rows ``called``, if it has all layers with a gradient, and then
    the rest."""
    known = set(called)
    if any(layer.norm is not None and row not in known for row, layer in enumerate(layers)):
        return layers
    return tuple(layers[row] for row in (*called, *sorted(set(range(len(layers))) - known)))
