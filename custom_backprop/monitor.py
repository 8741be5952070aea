"""Watches the gradients of a training run: which layer learns, which has stopped to, and what to do about it.

By the chain rule the gradient at layer l carries the Jacobians of all layers after it, ∂L/∂a_l = J_{l+1}ᵀ ... J_Lᵀ ∂L/∂a_L: it shrinks
or grows geometrically with depth unless each factor keeps its length. ``docs/gradients.md`` has the mathematics and the pictures.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel

__all__ = ["GradientMonitor", "JSONLines", "Layer", "Reading", "TensorBoard", "Verdict", "Writer"]

FALL, STEP = 4.0, 2.0  # decades between the largest layer and a vanished one, and the most that one step between layers counts
SURGE = 100.0  # times the largest total of the older half of the history
LOST = 1e-3  # of a layer's own share of the total, its median over the older half
OLD = 4  # readings before the history is judged by
DEAD, DIED = 0.75, 0.25  # the part of the units that is too much at any time, and above the least of the history
NORMALISED = re.compile("norm|softmax", re.IGNORECASE)

CURES = {
    "vanishing": "initialise for the activation (custom_backprop.init.init_for), take one that does not saturate, "
    "or normalise between layers",
    "exploding": "clip the norm (custom_backprop.nn.utils.clip_grad_norm_), lower the learning rate, or initialise for the activation "
    "(custom_backprop.init.init_for)",
    "dead units": "lower the learning rate, start the biases at 0, or take an activation with a slope everywhere (leaky_relu, elu, gelu)",
    "non-finite": "lower the learning rate, clip the norm (custom_backprop.nn.utils.clip_grad_norm_) or normalise; "
    "torch.autograd.set_detect_anomaly(True) names the op",
}


@dataclass(frozen=True)
class Verdict:
    """What is wrong, in which layer, how it was seen, and the cure."""

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
    """One module over the measured steps of a reading; its own parameters taken together. None: not measured, or it has no such thing.

    Attributes:
        norm: of the gradient, the root of the mean square over the steps in which it was finite; NaN if it never was.
        mean, std, zeros, nonfinite: of the gradient's elements; the last two are fractions.
        dead: the fraction of output units that got no gradient at all in any measured step.
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
    """What one window of steps showed. Prints the total and the verdicts; :meth:`table` prints the layers.

    Attributes:
        step: the number of the step it was read at, from 1.
        norm: of the whole gradient.
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
        return "\n  ".join([f"step {self.step}: gradient norm {self.norm:.3g}{update}", *map(str, self.verdicts)])

    def table(self) -> str:
        """One line a layer."""
        keys = [f.name for f in fields(Layer)][1:]
        width = max(len(layer.name) for layer in self.layers)
        lines = [" ".join([" " * width, *(f"{k.replace('activation', 'act'):>13}" for k in keys)])]
        for layer in self.layers:
            cells = (getattr(layer, k) for k in keys)
            lines.append(" ".join([f"{layer.name:{width}}", *(f"{'-' if c is None else format(c, '.3g'):>13}" for c in cells)]))
        return "\n".join(lines)

    def scalars(self, layers: bool) -> dict[str, float]:
        """All that was measured by name: the totals, and ``layer/statistic`` where ``layers`` are wanted."""
        found = {"norm": self.norm, "update": self.update}
        for layer in self.layers if layers else ():
            found |= {f"{layer.name}/{k}": v for k, v in asdict(layer).items() if k != "name"}
        return {k: v for k, v in found.items() if v is not None}


class Writer(Protocol):
    """Takes each reading as it comes."""

    def write(self, reading: Reading) -> None: ...


class JSONLines:
    """Appends a line of JSON a reading to ``path``: step, norm, update, verdicts; each layer's statistics if ``layers``. NaN is null."""

    def __init__(self, path: str | Path, layers: bool = False) -> None:
        self.path, self.layers = Path(path), layers

    def write(self, reading: Reading) -> None:
        scalars = {k: v if math.isfinite(v) else None for k, v in reading.scalars(self.layers).items()}
        verdicts = [{**asdict(v), "cure": v.cure} for v in reading.verdicts]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": reading.step, **scalars, "verdicts": verdicts}, allow_nan=False) + "\n")


class TensorBoard:
    """Scalars ``gradients/norm``, ``gradients/update`` and, if ``layers``, ``gradients/LAYER/STATISTIC``; the verdicts as text.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path, layers: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("writing for TensorBoard needs: pip install tensorboard (or take JSONLines)") from error
        self._open, self.directory, self.layers = SummaryWriter, str(directory), layers
        self._writer: Any = None

    def write(self, reading: Reading) -> None:
        if self._writer is None:
            self._writer = self._open(self.directory)
        for name, value in reading.scalars(self.layers).items():
            self._writer.add_scalar(f"gradients/{name}", value, reading.step)
        if reading.verdicts:
            self._writer.add_text("gradients/verdicts", "\n\n".join(map(str, reading.verdicts)), reading.step)
        self._writer.flush()


# Columns of the sums, all of which add up over steps and over shards: seven of gradients, seven of activations, then updates and units.
SQUARES, SUM, NONZERO, NONFINITE, ELEMENTS, GOOD, BAD = range(7)
GRADIENT, ACTIVATION, UPDATE, WEIGHT, DEAD_UNITS, UNITS, WIDTH = 0, 7, 14, 15, 16, 17, 18


class GradientMonitor:
    """Measures gradients, activations and updates of a model in training, and says which layer is in trouble.

    Call :meth:`step` once an optimizer step, after backward and before clipping and ``optimizer.step()``::

        monitor = GradientMonitor(model)
        for x, y in loader:
            loss(model(x), y).backward()
            if (reading := monitor.step()) and reading.verdicts:
                print(reading)
            optimizer.step()
            optimizer.zero_grad()

    In each window of ``every`` steps, ``measure`` are measured: a few sums a layer, added up on the device; one transfer at the end of
    the window makes them a :class:`Reading`. The other steps cost a counter. Nothing that training computes is touched.

    - Accumulation: call it when the sum is complete; the activations are those of all its passes.
    - Mixed precision: give ``scaler``. Gradients not yet unscaled are divided by its scale on the device. Steps that overflow, which the
      scaler skips by itself, are trouble only if no step of a window was finite.
    - DDP: what is read is the all-reduced gradient, alike on every rank.
    - FSDP2, and DTensor parameters in general: each rank sums its shards, and a window ends with one all-reduce, so every rank must call
      :meth:`step`. A step that is finite on some ranks only counts there.
    - ``torch.compile``: gradients and updates are right; the outputs of compiled modules cannot be seen, and are left out.
    - Activations are those of this rank (FSDP2: the mean over the ranks). The writer writes on rank 0.

    Verdicts, against the run itself:

    - *exploding*: the norm is 100 times what the older half of the history knew, or an update is larger than the weights, or gradients or
      activations grow by four decades through the network;
    - *vanishing*: they fall by as much, or a layer's part of the norm falls to a thousandth of its own past;
    - *dead units*: three quarters of a layer's units get no gradient at all in a window, or a quarter more than once did;
    - *non-finite*: NaN or infinity, in the layer where it begins.

    One step down to rounding noise between two layers is no vanishing: the gradient of the sum of a normalised output is zero, and
    rightly.

    Args:
        model: the module in training, plain, wrapped by DDP, sharded by ``fully_shard``, or compiled.
        every: steps between two readings.
        measure: how many of them are measured, evenly spread, the last among them; of a small network, a measured step takes three times
            as long. ``every=1`` measures all.
        activations: whether to measure the modules' outputs, by forward hooks that stand in measured steps only. None: where it can be
            done.
        updates: whether to measure ‖Δw‖ / ‖w‖. It keeps a copy of the weights from a measured step to the next.
        scaler: the ``torch.amp.GradScaler`` of the run.
        writer: gets each reading: :class:`JSONLines`, :class:`TensorBoard`, or anything with ``write(reading)``.
        keep: how many readings ``history`` holds (some 40 KB each for a hundred modules).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``every`` or ``measure`` is out of range, or nothing can get a gradient.
        RuntimeError: what wraps the model hides its gradients, or ``activations=True`` for a compiled model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 200,
        measure: int = 1,
        activations: bool | None = None,
        updates: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        writer: Writer | None = None,
        keep: int = 300,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if not 1 <= measure <= every:
            raise ValueError(f"expected 1 <= measure <= every, got measure={measure}, every={every}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        inner, compiled = _unwrap(model)
        if activations and compiled:
            raise RuntimeError(
                "activations=True: torch.compile leaves out hooks that come after it; leave activations at None, or compile later"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient")
        self.every, self.measure, self.updates, self.scaler, self.writer = every, measure, updates, scaler, writer
        self.activations = not compiled if activations is None else activations
        self.history: deque[Reading] = deque(maxlen=keep)
        self.steps = 0
        named = [(n, m) for n, m in inner.named_modules() if m._parameters or not any(m.children())]
        self.names = [n or type(m).__name__ for n, m in named]
        self._modules = [m for _, m in named]
        self._stride = every // measure
        self._hooks: list[Any] = []
        self._normalised = {n for n, m in zip(self.names, self._modules, strict=True) if NORMALISED.search(type(m).__name__)}
        self._seen: list[tuple[int, list[Tensor]]] = []  # row and sums of an output
        self._before: list[tuple[int, nn.Parameter, Tensor, float]] = []  # row, parameter, its value before the update, part
        self._table: Tensor | None = None  # the sums of the open window, a row a module
        self._alive: dict[int, tuple[Tensor, float]] = {}  # row -> the largest gradient of each output unit, part
        self._kept: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        self._mesh: Any = None
        self._watch()

    def step(self) -> Reading | None:
        """To be called once an optimizer step, between backward and clipping. Returns the reading where a window ends.

        Raises:
            RuntimeError: called in a compiled function, or gradients are such that their sums would be wrong (the message says why).
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("GradientMonitor.step() must be called outside of what torch.compile compiles")
        self.steps += 1
        if self._before:
            self._after_the_update()
        place = (self.steps - 1) % self.every + 1  # in the window, from 1
        if self._measured(place):
            self._measure()
        reading = self._read() if place == self.every else None
        self._watch()
        return reading

    def remove(self) -> None:
        """Takes every hook off the model and lets go of its tensors. The history stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before, self._alive, self._table = [], [], {}, None
        self._seen.clear()  # the hooks hold this very list

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def norms(self) -> tuple[list[int], list[str], list[list[float]]]:
        """The steps read, the layers that have gradients, and the norm of each layer (outer) at each step (inner), NaN for none."""
        names = [n for n in self.names if any(r[n].norm is not None for r in self.history)]
        table = [[math.nan if (norm := r[n].norm) is None else norm for r in self.history] for n in names]
        return [r.step for r in self.history], names, table

    def heat_map(self, path: str | Path) -> None:
        """Draws the gradient norm of layer x step, as a picture in ``path``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing has been read yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the heat map needs: pip install matplotlib") from error
        figure = Figure(figsize=(8, max(2.5, 0.22 * len(self.norms()[1]) + 1)), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        figure.colorbar(self.draw(axes), label="log10 ‖∂L/∂w‖")
        figure.savefig(path)

    def draw(self, axes: Any, **options: Any) -> Any:
        """Draws the heat map into matplotlib ``axes``. ``options`` go to ``pcolormesh`` (vmin, vmax: decades). 0 and NaN are blank."""
        steps, names, table = self.norms()
        if not steps:
            raise ValueError(f"nothing has been read yet: a window ends every {self.every} steps")
        decades = [[math.log10(v) if 0 < v < math.inf else math.nan for v in row] for row in table]
        mesh = axes.pcolormesh(decades, **({"cmap": "viridis"} | options))
        ticks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
        axes.set_xticks([t + 0.5 for t in ticks], [str(steps[t]) for t in ticks])
        some = range(0, len(names), -(-len(names) // 20))
        axes.set_yticks([i + 0.5 for i in some], [names[i] for i in some])
        axes.set(xlabel="step", ylabel="layer")
        axes.grid(False)
        axes.invert_yaxis()
        return mesh

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the steps counted, the history and the open window, without the update that follows a step just measured."""
        window = {"table": None if self._table is None else self._table.clone(), "alive": dict(self._alive)}
        return {"steps": self.steps, "history": [asdict(r) for r in self.history], "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of :meth:`state_dict`."""
        self.remove()
        self.steps = state["steps"]
        self.history.clear()
        for r in state["history"]:
            layers, verdicts = tuple(Layer(**x) for x in r["layers"]), tuple(Verdict(**v) for v in r["verdicts"])
            self.history.append(Reading(**{**r, "layers": layers, "verdicts": verdicts}))
        table, device = state["window"]["table"], next(p.device for m in self._modules for p in m.parameters())
        self._table = None if table is None else table.to(device)
        self._alive = {row: (alive.to(device), part) for row, (alive, part) in state["window"]["alive"].items()}
        self._watch()

    def _measured(self, place: int) -> bool:
        """Whether the step at ``place`` of a window is measured: the last is, and the others as evenly as whole numbers go."""
        back = self.every - place
        return back % self._stride == 0 and back // self._stride < self.measure

    def _watch(self) -> None:
        """Puts the forward hooks on before a measured step and takes them off after it."""
        wanted = self.activations and self._measured(self.steps % self.every + 1)
        if wanted and not self._hooks:
            self._hooks = [m.register_forward_hook(_hook(row, self._seen)) for row, m in enumerate(self._modules)]
        elif not wanted and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _gradients(self) -> Iterator[tuple[int, nn.Parameter, Tensor, float, bool]]:
        """Row, parameter, this rank's gradient, what it counts for among the ranks, and whether each of its rows is an output unit."""
        seen: set[int] = set()
        found = [(r, p) for r, m in enumerate(self._modules) for p in m._parameters.values() if p is not None and p.grad is not None]
        self._mesh = _mesh([p for _, p in found])
        for row, p in found:
            if id(p) in seen:
                continue
            seen.add(id(p))
            units, part = isinstance(self._modules[row], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)), 1.0
            if self._mesh is not None:
                placements = getattr(p.grad, "placements", ())
                if any(at.is_partial() for at in placements):
                    raise RuntimeError(f"the gradient of {self.names[row]!r} is not reduced yet (DTensor placements {placements})")
                shards = {d: at for d, at in enumerate(placements) if at.is_shard()}
                part = 1 / math.prod(n for d, n in enumerate(self._mesh.shape) if d not in shards)
                units &= all(at.is_shard(0) for at in shards.values())
            yield row, p, _local(p.grad), part, units

    @torch.no_grad()
    def _measure(self) -> None:
        rows, parts, table = [], [], []
        for row, p, g, part, units in self._gradients():
            by_unit = None
            if units and not g.is_sparse:
                by_unit = g.flatten(1).abs().amax(dim=1) if g.dim() > 1 else g.abs()
                alive = self._alive.get(row)
                self._alive[row] = by_unit if alive is None else torch.maximum(alive[0], by_unit), part
            table += _sums(g, by_unit)
            rows.append(row)
            parts.append(part)
            if self.updates:
                self._before.append((row, p, _local(p).clone(), part))
        if rows:
            self._add(GRADIENT, rows, parts, table, self._inverse_scale())
        if self._seen:
            rows, table = [row for row, _ in self._seen], [s for _, sums in self._seen for s in sums]
            self._seen.clear()
            self._add(ACTIVATION, rows, [1 / self._ranks()] * len(rows), table)

    def _add(self, first: int, rows: list[int], parts: list[float], table: list[Tensor], scale: Tensor | None = None) -> None:
        """Adds one step. A layer with anything non-finite counts as a bad step, with no norm and no mean."""
        if len(devices := {t.device for t in table}) > 1:
            raise RuntimeError(
                f"the model lies on several devices ({', '.join(sorted(map(str, devices)))}): give each part a monitor of its own"
            )
        sums = torch.stack(table).view(len(rows), 5)
        sums[:, SQUARES].square_()
        if scale is not None:
            sums[:, SUM] *= scale
            sums[:, SQUARES] *= scale.square()
        index, part, count = self._constants(rows, parts, sums)
        bad = sums.new_zeros(len(self.names)).index_add_(0, index, sums[:, NONFINITE]).gt(0)[index]
        sums[:, :NONZERO].masked_fill_(bad[:, None], 0)
        values = torch.cat([sums * part[:, None], torch.stack([count * ~bad, count * bad], dim=1)], dim=1)
        self._total(sums)[:, first : first + 7].index_add_(0, index, values)

    def _constants(self, rows: list[int], parts: list[float], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, parts, and 1 / (entries of the row · ranks) on the device. Copied there once: a copy would make the host wait."""
        key = (like.device, tuple(rows), tuple(parts))
        if key not in self._kept:
            entries = Counter(rows)
            count = [1 / entries[r] / self._ranks() for r in rows]
            self._kept[key] = torch.tensor(rows, device=like.device), like.new_tensor(parts), like.new_tensor(count)
        return self._kept[key]

    def _total(self, like: Tensor) -> Tensor:
        if self._table is None:
            self._table = like.new_zeros(len(self.names), WIDTH)
        return self._table

    def _ranks(self) -> int:
        return 1 if self._mesh is None else self._mesh.size()

    def _inverse_scale(self) -> Tensor | None:
        """1 / the scaler's scale while gradients carry it: enabled, and unscale_() not called yet in this step."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        if any(state["stage"] is OptState.UNSCALED for state in self.scaler._per_optimizer_states.values()):
            return None
        scale = self.scaler._get_scale_async()
        return None if scale is None else scale.to(_wide(scale)).reciprocal()

    @torch.no_grad()
    def _after_the_update(self) -> None:
        """‖Δw‖² and ‖w‖² of the update that followed the last measured step. The copies become the differences."""
        weights, copies = [_local(p) for _, p, _, _ in self._before], [copy for _, _, copy, _ in self._before]
        torch._foreach_sub_(copies, weights)
        norms = [torch.linalg.vector_norm(x, dtype=_float(x)) for x in (*copies, *weights)]
        squares = torch.stack(norms).to(_wide(norms[0])).square_().view(2, -1).T
        index, part, _ = self._constants([row for row, *_ in self._before], [part for *_, part in self._before], squares)
        self._total(squares)[:, UPDATE : WEIGHT + 1].index_add_(0, index, squares * part[:, None])
        self._before = []

    @torch.no_grad()
    def _read(self) -> Reading:
        """The one transfer of a window (and, of shards, the one all-reduce)."""
        layers = [Layer(name) for name in self.names]
        update = None
        if self._table is not None:
            for row, (alive, part) in self._alive.items():
                self._table[row, DEAD_UNITS] = (alive == 0).sum() * part
                self._table[row, UNITS] = alive.numel() * part
            if self._mesh is not None:
                for dim in range(self._mesh.ndim):
                    torch.distributed.all_reduce(self._table, group=self._mesh.get_group(dim))
            table = self._table.tolist()
            layers = [_layer(name, row) for name, row in zip(self.names, table, strict=True)]
            update = _root(sum(row[UPDATE] for row in table), sum(row[WEIGHT] for row in table))
        self._table, self._alive = None, {}
        norms = [layer.norm for layer in layers if layer.norm is not None]
        reading = Reading(self.steps, math.sqrt(sum(n * n for n in norms)) if norms else math.nan, update, tuple(layers))
        reading = replace(reading, verdicts=tuple(judge(reading, self.history, self._normalised, self.scaler is not None)))
        self.history.append(reading)
        if self.writer is not None and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            self.writer.write(reading)
        return reading


def judge(reading: Reading, history: Iterable[Reading], normalised: Collection[str] = (), overflows: bool = False) -> list[Verdict]:
    """What is wrong in ``reading``, given those before it.

    Args:
        normalised: the names of modules whose output is normalised: a gradient of exactly zero beneath one may be right.
        overflows: whether a scaler skips steps that overflow, so that only a window without a finite step is trouble.
    """
    layers = [layer for layer in reading.layers if layer.norm is not None and layer.nonfinite is not None]
    if found := _non_finite(reading, layers, overflows):
        return [v for v in (found, _too_far(reading)) if v]
    old = list(history)
    old = old[: len(old) // 2] if len(old) >= OLD else []
    verdicts = [_exploding(reading, layers, old), _vanishing(reading, layers, old), *_dead(reading, layers, list(history), normalised)]
    return [verdict for verdict in verdicts if verdict is not None]


def _non_finite(reading: Reading, layers: list[Layer], overflows: bool) -> Verdict | None:
    bad = [layer for layer in layers if layer.nonfinite and (not overflows or math.isnan(layer.norm or 0))]
    outputs = [layer for layer in reading.layers if layer.activation_nonfinite]
    if not bad:
        return None
    if outputs:
        evidence = f"{outputs[0].activation_nonfinite:.2g} of its output is NaN or infinite, the first in the network"
        return Verdict("non-finite", outputs[0].name, evidence)
    where = ", and the loss may be" if bad[-1] is layers[-1] else ", while that of the layers after it is finite"
    return Verdict("non-finite", bad[-1].name, f"{bad[-1].nonfinite:.2g} of its gradient is NaN or infinite{where}")


def _exploding(reading: Reading, layers: list[Layer], old: list[Reading]) -> Verdict | None:
    most = max((r.norm for r in old if math.isfinite(r.norm)), default=math.inf)
    if reading.norm > SURGE * most:
        worst = max(layers, key=lambda layer: (layer.norm or 0) / max(most, *(r[layer.name].norm or 0 for r in old)))
        return Verdict(
            "exploding", worst.name, f"the gradient's norm is {reading.norm:.3g}, {reading.norm / most:.3g} times the most of the past"
        )
    if found := _too_far(reading):
        return found
    for what, values in (("gradient", _norms(layers)), ("activation", _deviations(reading)[::-1])):
        if values and (fall := max(falls([v for _, v in values]))) >= FALL:
            largest = max(values, key=lambda v: v[1])
            return Verdict("exploding", largest[0], f"its {what} ({largest[1]:.3g}) has grown by {fall:.1f} decades through the network")
    return None


def _too_far(reading: Reading) -> Verdict | None:
    if reading.update is None or not reading.update > 1:
        return None
    worst = max(reading.layers, key=lambda layer: layer.update or 0)
    return Verdict("exploding", worst.name, f"an update is {worst.update:.3g} times as large as the weights")


def _vanishing(reading: Reading, layers: list[Layer], old: list[Reading]) -> Verdict | None:
    for what, values in (("gradient", _norms(layers)[::-1]), ("activation", _deviations(reading))):
        decades = falls([v for _, v in values])
        if gone := [name for (name, _), fall in zip(values, decades, strict=True) if fall >= FALL]:
            name, value = values[-1]
            more = f", as in {len(gone) - 1} more" if len(gone) > 1 else ""
            return Verdict("vanishing", name, f"its {what} ({value:.3g}) has fallen by {decades[-1]:.1f} decades through the network{more}")
    for layer in layers if old else ():
        was = statistics.median((r[layer.name].norm or 0) / r.norm if r.norm > 0 else 0 for r in old)
        now = (layer.norm or 0) / reading.norm if reading.norm else was
        if now < LOST * was:
            return Verdict("vanishing", layer.name, f"its part of the gradient's norm is {now:.2g}, and was {was:.2g}")
    return None


def _dead(reading: Reading, layers: list[Layer], history: list[Reading], normalised: Collection[str]) -> Iterator[Verdict]:
    place = {layer.name: i for i, layer in enumerate(reading.layers)}
    for i, layer in enumerate(layers):
        if layer.dead is None:
            continue
        if layer.dead == 1:
            after = next((other for other in layers[i + 1 :] if other.norm), None)
            if after is None or after is not layers[i + 1]:
                continue  # nothing arrives from the loss, or a later layer is to blame
            between = reading.layers[place[layer.name] + 1 : place[after.name] + 1]
            if any(other.name in normalised for other in between):
                continue
        least = min((d for r in history if (d := r[layer.name].dead) is not None), default=1.0)
        if layer.dead > DEAD or layer.dead > least + DIED:
            source = _source(reading, place[layer.name])
            yield Verdict("dead units", source, f"{layer.dead:.0%} of the units of {layer.name!r} get no gradient at all")


def _source(reading: Reading, i: int) -> str:
    """The layer whose silence silences the one at ``i``: its own, or that before it where the input is all zero."""
    while i > 0 and reading.layers[i - 1].activation_zeros == 1:
        i -= 1
    return next(layer.name for layer in reading.layers[i::-1] if layer.norm is not None)


def falls(values: Sequence[float]) -> list[float]:
    """How many decades each value and all after it lie below the largest, a step from one to the next counting two at most.

    A geometric fall takes many steps. One long step alone is a gradient that cancels to rounding noise, or a change of units.
    """
    level = list(accumulate(reversed(values), max))[::-1]  # the largest from here on
    fallen, decades = [], 0.0
    for before, here in pairwise([*level[:1], *level]):
        decades += min(STEP, math.log10(before / here) if here > 0 else STEP if before > 0 else 0.0)
        fallen.append(decades)
    return fallen


def _norms(layers: list[Layer]) -> list[tuple[str, float]]:
    return [(layer.name, layer.norm) for layer in layers if layer.norm is not None and math.isfinite(layer.norm)]


def _deviations(reading: Reading) -> list[tuple[str, float]]:
    return [(layer.name, s) for layer in reading.layers if (s := layer.activation_std) is not None and math.isfinite(s)]


def _layer(name: str, row: list[float]) -> Layer:
    gradient, activation = _statistics(row[GRADIENT:ACTIVATION]), _statistics(row[ACTIVATION:UPDATE])
    found: dict[str, float | None] = {f"activation_{k}": v for k, v in activation.items() if k != "norm"}
    dead = row[DEAD_UNITS] / row[UNITS] if row[UNITS] else None
    return Layer(name, **gradient, **found, dead=dead, update=_root(row[UPDATE], row[WEIGHT]))


def _statistics(sums: list[float]) -> dict[str, float | None]:
    steps = sums[GOOD] + sums[BAD]
    if not steps or not sums[ELEMENTS]:
        return {}
    good = sums[ELEMENTS] * sums[GOOD] / steps  # elements of the steps that were finite
    mean = sums[SUM] / good if good else math.nan
    return {
        "norm": math.sqrt(sums[SQUARES] / sums[GOOD]) if good else math.nan,
        "mean": mean,
        "std": math.sqrt(max(sums[SQUARES] / good - mean * mean, 0)) if good else math.nan,
        "zeros": 1 - sums[NONZERO] / sums[ELEMENTS],
        "nonfinite": sums[NONFINITE] / sums[ELEMENTS],
    }


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole else None


def _hook(row: int, seen: list[tuple[int, list[Tensor]]]) -> Any:
    """Adds up a module's output, in training only: a validation pass without gradients is none of ours, nor is a trace."""

    def look(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(first, Tensor) or not first.is_floating_point():
            return
        with torch.no_grad():
            seen.append((row, _sums(_local(first.detach()))))

    return look


def _sums(x: Tensor, by_unit: Tensor | None = None) -> list[Tensor]:
    """‖x‖ (squared later, all at once), Σx, how many are not 0, how many are not finite, how many there are.

    x is divided by its largest element first (``by_unit``: the largest of each row, where that is known): the squares of a vanished
    gradient are no numbers of float32, and float64 takes ten times as long on a CPU.
    """
    elements = x.new_full((), x.numel(), dtype=_wide(x), layout=torch.strided)
    if x.is_sparse:
        x = x.coalesce().values()
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.numel():
        return [torch.zeros_like(elements)] * 4 + [elements]
    dtype = _float(x)
    largest = (x.abs() if by_unit is None else by_unit).amax().to(dtype)
    nonzero = torch.count_nonzero(x)
    finite = x.is_cpu and math.isfinite(largest.item())  # a CPU need not wait for its own numbers
    nonfinite = torch.zeros_like(nonzero) if finite else torch.count_nonzero(x - x)  # x - x is NaN where x is not finite
    scaled, wide = x.to(dtype) / largest.clamp_min(torch.finfo(dtype).tiny), largest.to(_wide(x))
    return [torch.linalg.vector_norm(scaled) * wide, scaled.sum() * wide, nonzero, nonfinite, elements]


def _float(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _is_dtensor(x: Any) -> bool:
    """Without the import of torch.distributed.tensor, which takes longer than that of all else here."""
    return hasattr(x, "to_local")


def _local(x: Any) -> Tensor:
    """This rank's part."""
    return x.to_local() if _is_dtensor(x) else x


def _mesh(parameters: list[Any]) -> Any:
    """The mesh over which DTensor parameters are spread, None if there is none.

    Raises:
        RuntimeError: there are several.
    """
    meshes = {p.device_mesh for p in parameters if _is_dtensor(p)}
    if len(meshes) > 1:
        raise RuntimeError(f"the parameters are spread over {len(meshes)} device meshes: give each part a monitor of its own")
    return next(iter(meshes), None)


def _unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside DDP and torch.compile, and whether any of it is compiled.

    Raises:
        RuntimeError: the wrapper hides the layers' gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise RuntimeError(
                "nn.DataParallel runs copies of the modules in threads, out of sight of a monitor: use DistributedDataParallel"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError("FSDP1 flattens the layers' parameters into one: use fully_shard (FSDP2)")
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    while hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
        model = getattr(model, "module" if isinstance(model, DistributedDataParallel) else "_orig_mod")
    return model, compiled
