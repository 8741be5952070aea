"""The monitor itself: what it measures in a step, and the reading at the end of a window."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel

from ..dtensor import is_dtensor, local
from ..nn import LinearActivation
from .judge import judge
from .outputs import LAYERS, Look, Outputs
from .reading import Layer, Reading, Verdict
from .sums import (
    ACTIVATION,
    DEAD_UNITS,
    GRADIENT,
    NONFINITE,
    NONZERO,
    SEEN_UNITS,
    SILENT_UNITS,
    SQUARES,
    SUM,
    UNITS,
    UPDATE,
    WEIGHT,
    WIDTH,
    dtype_of,
    layer_of,
    root,
    sums_of,
    wide_of,
)
from .writers import Writer

NORMALISED = re.compile("norm|softmax", re.IGNORECASE)


class GradientMonitor:
    """Measures gradients, activations and updates of a model in training, and says which layer is
    in trouble.

    Call :meth:`step` once an optimizer step, after backward and before clipping and
    ``optimizer.step()``::

        monitor = GradientMonitor(model)
        for x, y in loader:
            loss(model(x), y).backward()
            if (reading := monitor.step()) and reading.verdicts:
                print(reading)
            optimizer.step()
            optimizer.zero_grad()

    In each window of ``every`` steps, ``measure`` are measured: a few sums a layer, added up on the
    device; one transfer at the end of the window makes them a :class:`Reading`. The other steps
    cost a counter. Nothing that training computes is touched.

    - Accumulation: call it when the sum is complete; the activations are those of all its passes.
    - Mixed precision: give ``scaler``. Gradients not yet unscaled are divided by its scale on the
      device. Steps that overflow, which the scaler skips by itself, are trouble only if no step of
      a window was finite.
    - DDP: what is read is the all-reduced gradient, alike on every rank.
    - FSDP2, and DTensor parameters in general: each rank sums its shards, and a window ends with
      one all-reduce, so every rank must call :meth:`step`. A step that is finite on some ranks only
      counts there.
    - ``torch.compile``: gradients and updates are right; the outputs of compiled modules cannot be
      seen, and are left out.
    - Activations are those of this rank (FSDP2: the mean over the ranks). The writer writes on rank
      0.

    Verdicts, against the run itself:

    - *exploding*: the norm is 100 times what the older half of the history knew, or an update is
      larger than the weights, or gradients or activations grow by four decades through the network;
    - *vanishing*: they fall by as much, or a layer's part of the norm falls to a thousandth of its
      own past;
    - *dead units*: three quarters of a layer's units are silent and get no gradient at all in a
      window, or a quarter more than once did. Without outputs, silence of the gradients must last
      four readings;
    - *non-finite*: NaN or infinity, in the layer where it begins.

    One step down to rounding noise between two layers is no vanishing: the gradient of the sum of a
    normalised output is zero, and rightly.

    Args:
        model: the module in training, plain, wrapped by DDP, sharded by ``fully_shard``, or
            compiled.
        every: steps between two readings.
        measure: how many of them are measured, evenly spread, the last among them; of a small
            network, a measured step takes three times as long. ``every=1`` measures all.
        activations: whether to measure the modules' outputs, by forward hooks that stand in
            measured steps only. None: where it can be done.
        updates: whether to measure ‖Δw‖ / ‖w‖. It keeps a copy of the weights from a measured step
            to the next.
        scaler: the ``torch.amp.GradScaler`` of the run.
        writer: gets each reading: :class:`JSONLines`, :class:`TensorBoard`, or anything with
            ``write(reading)``.
        keep: how many readings ``history`` holds (some 40 KB each for a hundred modules).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``every`` or ``measure`` is out of range, or nothing can get a gradient.
        RuntimeError: what wraps the model hides its gradients, or ``activations=True`` for a
            compiled model.
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
            raise ValueError(
                f"expected 1 <= measure <= every, got measure={measure}, every={every}"
            )
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        inner, compiled = _unwrap(model)
        if activations and compiled:
            raise RuntimeError(
                "activations=True: torch.compile leaves out hooks that come after it; leave activations at None, or compile later"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient")
        self.every, self.measure, self.updates, self.scaler, self.writer = (
            every,
            measure,
            updates,
            scaler,
            writer,
        )
        self.activations = not compiled if activations is None else activations
        self.history: deque[Reading] = deque(maxlen=keep)
        self.steps = 0
        named = [(n, m) for n, m in inner.named_modules() if m._parameters or not any(m.children())]
        self.names = [n or type(m).__name__ for n, m in named]
        self._model, self._modules = inner, [m for _, m in named]
        self._stride = every // measure
        self._hooks: list[Any] = []
        self._normalised = {
            n
            for n, m in zip(self.names, self._modules, strict=True)
            if NORMALISED.search(type(m).__name__)
        }
        self._outputs = Outputs(
            {row for row, m in enumerate(self._modules) if isinstance(m, LinearActivation)}
        )
        self._removed = False
        self._called: list[int] = []  # rows in the order of forward
        self._before: list[
            tuple[int, nn.Parameter, Tensor, float]
        ] = []  # row, parameter, its value before the update, part
        self._table: Tensor | None = None  # the sums of the open window, a row a module
        self._alive: dict[
            int, tuple[Tensor, float]
        ] = {}  # row -> the largest gradient of each output unit, part
        self._kept: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        self._mesh: Any = None
        self._watch()

    def step(self) -> Reading | None:
        """To be called once an optimizer step, between backward and clipping. Returns the reading
        where a window ends.

        Raises:
            RuntimeError: called in a compiled function or after :meth:`remove`, or gradients are
                such that their sums would be wrong (the message says why).
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "GradientMonitor.step() must be called outside of what torch.compile compiles"
            )
        if self._removed:
            raise RuntimeError("GradientMonitor.step() was called after remove()")
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
        self._hooks, self._before, self._alive, self._table, self._removed = [], [], {}, None, True
        self._outputs.end_step()
        self._outputs.end_window()

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def norms(self) -> tuple[list[int], list[str], list[list[float]]]:
        """The steps read, the layers that have gradients, and the norm of each layer (outer) at
        each step (inner), NaN for none."""
        names = [n for n in self.names if any(r[n].norm is not None for r in self.history)]
        table = [
            [math.nan if (norm := r[n].norm) is None else norm for r in self.history] for n in names
        ]
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
        figure = Figure(
            figsize=(8, max(2.5, 0.22 * len(self.norms()[1]) + 1)), dpi=120, layout="constrained"
        )
        axes = figure.add_subplot()
        figure.colorbar(self.draw(axes), label="log10 ‖∂L/∂w‖")
        figure.savefig(path)

    def draw(self, axes: Any, **options: Any) -> Any:
        """Draws the heat map into matplotlib ``axes``. ``options`` go to ``pcolormesh`` (vmin,
        vmax: decades). 0 and NaN are blank."""
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
        """For a checkpoint: the steps counted, the history and the open window, without the update
        that follows a step just measured."""
        table = None if self._table is None else self._table.clone()
        window = {
            "table": table,
            "alive": dict(self._alive),
            "ranges": dict(self._outputs.ranges),
            "passed": list(self._outputs.passed),
        }
        return {"steps": self.steps, "history": [asdict(r) for r in self.history], "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of :meth:`state_dict`."""
        self.remove()
        self._removed = False
        self.steps = state["steps"]
        self.history.clear()
        for r in state["history"]:
            layers, verdicts = (
                tuple(Layer(**x) for x in r["layers"]),
                tuple(Verdict(**v) for v in r["verdicts"]),
            )
            self.history.append(Reading(**{**r, "layers": layers, "verdicts": verdicts}))
        window, device = (
            state["window"],
            next(p.device for m in self._modules for p in m.parameters()),
        )
        self._table = None if window["table"] is None else window["table"].to(device)
        self._alive = {
            row: (alive.to(device), part) for row, (alive, part) in window["alive"].items()
        }
        self._outputs.ranges = {
            stage: (least.to(device), most.to(device))
            for stage, (least, most) in window["ranges"].items()
        }
        self._outputs.passed = set(window["passed"])
        self._watch()

    def _measured(self, place: int) -> bool:
        """Whether the step at ``place`` of a window is measured: the last is, and the others as
        evenly as whole numbers go."""
        back = self.every - place
        return back % self._stride == 0 and back // self._stride < self.measure

    def _watch(self) -> None:
        """Puts the forward hooks on before a measured step and takes them off after it."""
        wanted = self.activations and self._measured(self.steps % self.every + 1)
        if wanted and not self._hooks:
            self._hooks = [
                m.register_forward_hook(Look(row, self._outputs))
                for row, m in enumerate(self._modules)
            ]
            self._hooks.append(self._model.register_forward_hook(Look(None, self._outputs)))
        elif not wanted and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _gradients(self) -> Iterator[tuple[int, nn.Parameter, Tensor, float, bool]]:
        """Row, parameter, this rank's gradient, what it counts for among the ranks, and whether
        each of its rows is an output unit."""
        seen: set[int] = set()
        named = [
            (r, name, p) for r, m in enumerate(self._modules) for name, p in m._parameters.items()
        ]
        found = [(r, name, p) for r, name, p in named if p is not None and p.grad is not None]
        self._mesh = _mesh([p for *_, p in found])
        for row, name, p in found:
            if id(p) in seen:
                continue
            seen.add(id(p))
            units, part = (
                isinstance(self._modules[row], tuple(LAYERS)) and name in ("weight", "bias"),
                1.0,
            )
            if self._mesh is not None:
                placements = getattr(p.grad, "placements", ())
                if any(at.is_partial() for at in placements):
                    raise RuntimeError(
                        f"the gradient of {self.names[row]!r} is not reduced yet (DTensor placements {placements})"
                    )
                shards = {d: at for d, at in enumerate(placements) if at.is_shard()}
                part = 1 / math.prod(n for d, n in enumerate(self._mesh.shape) if d not in shards)
                units &= all(at.is_shard(0) for at in shards.values())
            yield row, p, local(p.grad), part, units

    @torch.no_grad()
    def _measure(self) -> None:
        rows, parts, table = [], [], []
        for row, p, g, part, units in self._gradients():
            by_unit = None
            if units and not g.is_sparse:
                by_unit = g.flatten(1).abs().amax(dim=1) if g.dim() > 1 else g.abs()
                alive = self._alive.get(row)
                self._alive[row] = (
                    by_unit if alive is None else torch.maximum(alive[0], by_unit),
                    part,
                )
            table += sums_of(g, by_unit)
            rows.append(row)
            parts.append(part)
            if self.updates:
                self._before.append((row, p, local(p).clone(), part))
        if rows:
            self._add(GRADIENT, rows, parts, table, self._inverse_scale())
        if seen := self._outputs.sums:
            rows, table = [row for row, _ in seen], [s for _, sums in seen for s in sums]
            self._called = list(dict.fromkeys(self._outputs.called))
            self._add(ACTIVATION, rows, [1 / self._ranks()] * len(rows), table)
        self._outputs.end_step()

    def _add(
        self,
        first: int,
        rows: list[int],
        parts: list[float],
        table: list[Tensor],
        scale: Tensor | None = None,
    ) -> None:
        """Adds one step. A layer with anything non-finite counts as a bad step, with no norm and no
        mean."""
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
        values = torch.cat(
            [sums * part[:, None], torch.stack([count * ~bad, count * bad], dim=1)], dim=1
        )
        self._total(sums)[:, first : first + 7].index_add_(0, index, values)

    def _constants(
        self, rows: list[int], parts: list[float], like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, parts, and 1 / (entries of the row · ranks) on the device. Copied there once: a
        copy would make the host wait."""
        key = (like.device, tuple(rows), tuple(parts))
        if key not in self._kept:
            entries = Counter(rows)
            count = [1 / entries[r] / self._ranks() for r in rows]
            self._kept[key] = (
                torch.tensor(rows, device=like.device),
                like.new_tensor(parts),
                like.new_tensor(count),
            )
        return self._kept[key]

    def _total(self, like: Tensor) -> Tensor:
        if self._table is None:
            self._table = like.new_zeros(len(self.names), WIDTH)
        return self._table

    def _ranks(self) -> int:
        return 1 if self._mesh is None else self._mesh.size()

    def _inverse_scale(self) -> Tensor | None:
        """1 / the scaler's scale while gradients carry it: enabled, and unscale_() not called yet
        in this step."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        if any(
            state["stage"] is OptState.UNSCALED
            for state in self.scaler._per_optimizer_states.values()
        ):
            return None
        scale = self.scaler._get_scale_async()
        return None if scale is None else scale.to(wide_of(scale)).reciprocal()

    @torch.no_grad()
    def _after_the_update(self) -> None:
        """‖Δw‖² and ‖w‖² of the update that followed the last measured step. The copies become the
        differences."""
        weights, copies = (
            [local(p) for _, p, _, _ in self._before],
            [copy for _, _, copy, _ in self._before],
        )
        torch._foreach_sub_(copies, weights)
        norms = [torch.linalg.vector_norm(x, dtype=dtype_of(x)) for x in (*copies, *weights)]
        squares = torch.stack(norms).to(wide_of(norms[0])).square_().view(2, -1).T
        index, part, _ = self._constants(
            [row for row, *_ in self._before], [part for *_, part in self._before], squares
        )
        self._total(squares)[:, UPDATE : WEIGHT + 1].index_add_(0, index, squares * part[:, None])
        self._before = []

    def _in_order(self, reading: Reading) -> Reading:
        """The layers in the order in which forward called them, if it is known of all that have a
        gradient."""
        called = set(self._called)
        if any(
            layer.norm is not None and row not in called for row, layer in enumerate(reading.layers)
        ):
            return reading
        rest = [row for row in range(len(self.names)) if row not in called]
        return replace(reading, layers=tuple(reading.layers[row] for row in (*self._called, *rest)))

    @torch.no_grad()
    def _read(self) -> Reading:
        """The one transfer of a window (and, of shards, the one all-reduce)."""
        layers = [Layer(name) for name in self.names]
        update = None
        if self._table is not None:
            for row, (alive, part) in self._alive.items():
                self._table[row, DEAD_UNITS] = (alive == 0).sum() * part
                self._table[row, UNITS] = alive.numel() * part
            for row, silent in self._outputs.silent():
                self._table[row, SILENT_UNITS] = silent.sum()
                self._table[row, SEEN_UNITS] = silent.numel()
            if self._mesh is not None:
                for dim in range(self._mesh.ndim):
                    torch.distributed.all_reduce(self._table, group=self._mesh.get_group(dim))
            table = self._table.tolist()
            layers = [layer_of(name, row) for name, row in zip(self.names, table, strict=True)]
            update = root(sum(row[UPDATE] for row in table), sum(row[WEIGHT] for row in table))
        self._table, self._alive = None, {}
        self._outputs.end_window()
        norms = [layer.norm for layer in layers if layer.norm is not None]
        reading = Reading(
            self.steps,
            math.sqrt(sum(n * n for n in norms)) if norms else math.nan,
            update,
            tuple(layers),
        )
        scaled = self.scaler is not None and self.scaler.is_enabled()
        reading = replace(
            reading,
            verdicts=tuple(judge(self._in_order(reading), self.history, self._normalised, scaled)),
        )
        self.history.append(reading)
        if self.writer is not None and (
            not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        ):
            self.writer.write(reading)
        return reading


def _mesh(parameters: list[Any]) -> Any:
    """The mesh over which DTensor parameters are spread, None if there is none.

    Raises:
        RuntimeError: there are several.
    """
    meshes = {p.device_mesh for p in parameters if is_dtensor(p)}
    if len(meshes) > 1:
        raise RuntimeError(
            f"the parameters are spread over {len(meshes)} device meshes: give each part a monitor of its own"
        )
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
            raise RuntimeError(
                "FSDP1 flattens the layers' parameters into one: use fully_shard (FSDP2)"
            )
    compiled = any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
    )
    while hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
        model = getattr(
            model, "module" if isinstance(model, DistributedDataParallel) else "_orig_mod"
        )
    return model, compiled
