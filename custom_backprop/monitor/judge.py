"""The verdicts on a reading, given the readings before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

from .reading import Layer, Reading, Verdict

#: a vanished layer is this many decades below the largest
FALL = 4.0
#: one step between two layers counts at most this many decades
STEP = 2.0
#: an exploding total is this many times the largest of the older half of the history
SURGE = 100.0
#: a layer that lost its gradient has this fraction of its median share over the older half
LOST = 1e-3
#: this many readings must exist before the history counts
OLD = 4
#: a gradient below this fraction of that after a normalisation is a rounding error
CANCELLED = 1e-4
#: this fraction of dead units is too much at any time
DEAD = 0.75
#: this fraction more than the minimum of the history is too much
DIED = 0.25


def judge(
    reading: Reading,
    history: Iterable[Reading],
    normalised: Collection[str] = (),
    overflows: bool = False,
) -> list[Verdict]:
    """What is wrong in ``reading``, given those before it.

    Args:
        normalised: the names of modules whose output is normalised. A gradient of exactly zero
            before one of them may be right.
        overflows: whether a scaler skips steps that overflow. Then only a window without any finite
            step gets a verdict.
    """
    layers = [
        layer for layer in reading.layers if layer.norm is not None and layer.nonfinite is not None
    ]
    if found := _non_finite(reading, layers, overflows):
        return [v for v in (found, _too_far(reading)) if v]
    old = list(history)
    old = old[: len(old) // 2] if len(old) >= OLD else []
    verdicts = [
        _exploding(reading, layers, old),
        _vanishing(reading, layers, old),
        *_dead(reading, layers, list(history), normalised),
    ]
    return [verdict for verdict in verdicts if verdict is not None]


def _non_finite(reading: Reading, layers: list[Layer], overflows: bool) -> Verdict | None:
    bad = [
        layer
        for layer in layers
        if layer.nonfinite and (not overflows or math.isnan(layer.norm or 0))
    ]
    outputs = [layer for layer in reading.layers if layer.activation_nonfinite]
    if not bad:
        return None
    if outputs:
        part = f"{outputs[0].activation_nonfinite:.2g}"
        evidence = f"{part} of its output is NaN or infinite, the first in the network"
        return Verdict("non-finite", outputs[0].name, evidence)
    last = bad[-1] is layers[-1]
    where = "and the loss may be" if last else "while that of the layers after it is finite"
    evidence = f"{bad[-1].nonfinite:.2g} of its gradient is NaN or infinite, {where}"
    return Verdict("non-finite", bad[-1].name, evidence)


def _exploding(reading: Reading, layers: list[Layer], old: list[Reading]) -> Verdict | None:
    most = max((r.norm for r in old if math.isfinite(r.norm)), default=math.inf)
    if most > 0 and reading.norm > SURGE * most:
        worst = max(layers, key=lambda layer: layer.norm or 0)
        times = f"{reading.norm / most:.3g} times the largest of the past"
        return Verdict(
            "exploding", worst.name, f"the gradient's norm is {reading.norm:.3g}, {times}"
        )
    if found := _too_far(reading):
        return found
    for what, values in (("gradient", _norms(layers)), ("activation", _deviations(reading)[::-1])):
        if values and (fall := max(falls([v for _, v in values]))) >= FALL:
            name, value = max(values, key=lambda v: v[1])
            evidence = f"its {what} ({value:.3g}) has grown by {fall:.1f} decades through"
            return Verdict("exploding", name, f"{evidence} the network")
    return None


def _too_far(reading: Reading) -> Verdict | None:
    if reading.update is None or not reading.update > 1:
        return None
    worst = max(reading.layers, key=lambda layer: layer.update or 0)
    return Verdict(
        "exploding", worst.name, f"an update is {worst.update:.3g} times as large as the weights"
    )


def _vanishing(reading: Reading, layers: list[Layer], old: list[Reading]) -> Verdict | None:
    for what, values in (("gradient", _norms(layers)[::-1]), ("activation", _deviations(reading))):
        decades = falls([v for _, v in values])
        if gone := [name for (name, _), fall in zip(values, decades, strict=True) if fall >= FALL]:
            name, value = values[-1]
            more = f", as in {len(gone) - 1} more" if len(gone) > 1 else ""
            evidence = f"its {what} ({value:.3g}) has fallen by {decades[-1]:.1f} decades through"
            return Verdict("vanishing", name, f"{evidence} the network{more}")
    for layer in layers if old else ():
        was = statistics.median(
            (r[layer.name].norm or 0) / r.norm if r.norm > 0 else 0 for r in old
        )
        now = (layer.norm or 0) / reading.norm if reading.norm else was
        if now < LOST * was:
            evidence = f"its share of the gradient's norm is {now:.2g}, and was {was:.2g}"
            return Verdict("vanishing", layer.name, evidence)
    return None


def _dead(
    reading: Reading, layers: list[Layer], history: list[Reading], normalised: Collection[str]
) -> Iterator[Verdict]:
    index = {layer.name: i for i, layer in enumerate(reading.layers)}
    cancelled = _cancelled(reading, layers, index, normalised)
    for i, layer in enumerate(layers):
        if layer.dead is None or layer.name in cancelled:
            continue
        if layer.dead == 1:
            after = next(
                (other for other in layers[i + 1 :] if other.dead is not None or other.norm), None
            )
            if after is None or not after.norm:
                continue  # the loss sends no gradient, or a later layer is the cause
        past = [d for r in history if (d := r[layer.name].dead) is not None]
        dead, long = layer.dead, ""
        if layer.activation_std is None:
            # gradients alone cannot tell the dead from those the loss does not ask: death lasts
            long = f", {OLD} times in a row"
            dead = min([dead, *past[1 - OLD :]]) if len(past) >= OLD - 1 else 0.0
        if dead > DEAD or dead > min(past, default=1.0) + DIED:
            source = _source(reading, index[layer.name])
            yield Verdict(
                "dead units",
                source,
                f"{dead:.0%} of the units of {layer.name!r} get no gradient at all{long}",
            )


def _cancelled(
    reading: Reading, layers: list[Layer], index: dict[str, int], normalised: Collection[str]
) -> set[str]:
    """The layers before a normalised output whose gradient is zero, or a rounding error instead of
    zero. It may be right."""
    found: set[str] = set()
    for here, after in zip(layers[-2::-1], layers[:0:-1], strict=True):
        norm, rest = here.norm or 0.0, after.norm or 0.0
        beneath = any(
            other.name in normalised
            for other in reading.layers[index[here.name] + 1 : index[after.name] + 1]
        )
        if (beneath and rest > 0 and norm <= CANCELLED * rest) or (
            after.name in found and norm <= rest / CANCELLED
        ):
            found.add(here.name)
    return found


def _source(reading: Reading, i: int) -> str:
    """The layer that makes the one at ``i`` silent: that layer itself, or one before it if the
    input is all zero."""
    silent = reading.layers[i].name
    while i > 0 and reading.layers[i - 1].activation_zeros == 1:
        i -= 1
    return next((layer.name for layer in reading.layers[i::-1] if layer.norm is not None), silent)


def falls(values: Sequence[float]) -> list[float]:
    """How many decades each value and all values after it are below the largest. A step from one to
    the next counts at most two decades.

    A geometric fall takes many steps. A single long step is a gradient that cancels to rounding
    noise, or a change of units.
    """
    level = list(accumulate(reversed(values), max))[::-1]  # the largest from here on
    fallen, decades = [], 0.0
    for before, here in pairwise([*level[:1], *level]):
        decades += min(STEP, math.log10(before / here) if here > 0 else STEP if before > 0 else 0.0)
        fallen.append(decades)
    return fallen


def _norms(layers: list[Layer]) -> list[tuple[str, float]]:
    return [
        (layer.name, layer.norm)
        for layer in layers
        if layer.norm is not None and math.isfinite(layer.norm)
    ]


def _deviations(reading: Reading) -> list[tuple[str, float]]:
    return [
        (layer.name, s)
        for layer in reading.layers
        if (s := layer.activation_std) is not None and math.isfinite(s)
    ]
