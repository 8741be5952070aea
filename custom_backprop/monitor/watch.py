"""The monitor: what it measures in a step, and the reading at the end of a window."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import local
from ..nn import LinearActivation
from . import chart, checkpoint
from .gradients import gradients, inverse_scale, mesh_of, unwrapped, with_gradients
from .judge import judge
from .outputs import Look, Outputs
from .reading import Layer, Reading, in_order
from .sums import ACTIVATION, GRADIENT, UPDATE, WEIGHT, layer_of, root, squares_of, sums_of
from .window import Window
from .writers import Writer

NORMALISED = re.compile("norm|softmax", re.IGNORECASE)


class GradientMonitor:
    """Measures gradients, activations and updates of a model in training, and says what is wrong in
    which layer.

    Call :meth:`step` once per optimizer step, after backward, before clipping and
    ``optimizer.step()``::

        monitor = GradientMonitor(model)
        for x, y in loader:
            loss(model(x), y).backward()
            if (reading := monitor.step()) and reading.verdicts:
                print(reading)
            optimizer.step()
            optimizer.zero_grad()

    In each window of ``every`` steps it measures ``measure`` steps: a few sums per layer, which are
    added up on the device. One transfer at the end of the window turns them into a
    :class:`Reading`. Other steps are only counted. The monitor does not change what training
    computes.

    - Accumulation: call it when the sum is complete. Activations are those of all passes.
    - Mixed precision: pass ``scaler``. Gradients that are not unscaled yet are divided by its scale
      on the device. The scaler skips steps that overflow, so they get a verdict only if no step of
      a window was finite.
    - DDP: the gradient is the all-reduced one, equal on every rank.
    - FSDP2, and DTensor parameters in general: each rank sums its shards, and a window ends with
      one all-reduce, so every rank must call :meth:`step`. If a step is finite on some ranks only,
      it counts only there.
    - ``torch.compile``: gradients and updates are right. The outputs of compiled modules cannot be
      seen, and are left out.
    - Activations are those of this rank (FSDP2: the mean over the ranks). The writer writes on rank
      0.

    Verdicts compare a reading with the run itself:

    - *exploding*: the norm is 100 times the largest of the older half of the history, or an update
      is larger than the weights, or gradients or activations grow by four decades through the
      network;
    - *vanishing*: they fall by as much, or a layer's share of the norm falls to a thousandth of
      what it was;
    - *dead units*: three quarters of a layer's units are silent and get no gradient at all in a
      window, or a quarter more than at some earlier time. Without outputs, there must be no
      gradient in four readings in a row;
    - *non-finite*: NaN or infinity, in the layer where it begins.

    A single step down to rounding noise between two layers does not count as vanishing: the
    gradient of the sum of a normalised output should be zero.

    Args:
        model: the module in training, plain, wrapped by DDP, sharded by ``fully_shard``, or
            compiled.
        every: steps between two readings.
        measure: how many of them are measured, at equal distances and including the last one. In a
            small network a measured step takes three times as long. ``every=1`` measures all.
        activations: whether to measure the modules' outputs, by forward hooks that exist in
            measured steps only. None: if it is possible.
        updates: whether to measure ‖Δw‖ / ‖w‖. It needs a copy of the weights from a measured step
            to the next step.
        scaler: the ``torch.amp.GradScaler`` of the run.
        writer: gets each reading: :class:`JSONLines`, :class:`TensorBoard`, or anything with
            ``write(reading)``.
        keep: how many readings stay in ``history`` (about 40 KB each for a hundred modules).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``every`` or ``measure`` is out of range, or nothing can get a gradient.
        RuntimeError: a wrapper around the model hides its gradients, or ``activations=True`` for a
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
        inner, compiled = unwrapped(model)
        if activations and compiled:
            raise RuntimeError(
                "activations=True: torch.compile leaves out hooks that come after it; "
                "leave activations at None, or compile later"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient")
        self.every, self.measure, self.updates = every, measure, updates
        self.scaler, self.writer = scaler, writer
        self.activations = not compiled if activations is None else activations
        self.history: deque[Reading] = deque(maxlen=keep)
        self.steps = 0
        named = [(n, m) for n, m in inner.named_modules() if m._parameters or not any(m.children())]
        self.names = [n or type(m).__name__ for n, m in named]
        self._model, self._modules = inner, [m for _, m in named]
        kinds = zip(self.names, map(type, self._modules), strict=True)
        self._normalised = {name for name, kind in kinds if NORMALISED.search(kind.__name__)}
        self._hooks: list[Any] = []
        self._removed = False
        self._called: list[int] = []  # rows in the order of forward
        #: row, parameter, its value before the update, share
        self._before: list[tuple[int, nn.Parameter, Tensor, float]] = []
        self._window = Window(self.names)
        self._outputs = Outputs(
            {row for row, m in enumerate(self._modules) if isinstance(m, LinearActivation)}
        )
        self._watch()

    def step(self) -> Reading | None:
        """Call this once per optimizer step, between backward and clipping. It returns the reading
        if a window ends.

        Raises:
            RuntimeError: it was called in a compiled function or after :meth:`remove`, or the sums
                over the gradients would be wrong (the message says why).
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("GradientMonitor.step() must not be called in a compiled function")
        if self._removed:
            raise RuntimeError("GradientMonitor.step() was called after remove()")
        self.steps += 1
        if self._before:
            self._after_the_update()
        number = (self.steps - 1) % self.every + 1
        if self._measures(number):
            self._measure()
        reading = self._read() if number == self.every else None
        self._watch()
        return reading

    def remove(self) -> None:
        """Removes every hook from the model and releases its tensors. The history stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before, self._removed = [], [], True
        self._window = Window(self.names)
        self._outputs.end_step()
        self._outputs.end_window()

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def norms(self) -> tuple[list[int], list[str], list[list[float]]]:
        """The steps with a reading, the layers that have gradients, and the norm of each layer
        (outer) at each step (inner), NaN if there is none."""
        return chart.norms(self.history, self.names)

    def heat_map(self, path: str | Path) -> None:
        """Draws the gradient norm by layer and step, and saves the picture to ``path``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no reading yet.
        """
        chart.save(path, *self._drawn())

    def draw(self, axes: Any, **options: Any) -> Any:
        """Draws the heat map into matplotlib ``axes``. ``options`` go to ``pcolormesh`` (vmin,
        vmax: decades). 0 and NaN are blank."""
        return chart.draw(axes, *self._drawn(), **options)

    def _drawn(self) -> tuple[list[int], list[str], list[list[float]]]:
        if not self.history:
            raise ValueError(f"nothing has been read yet: a window ends every {self.every} steps")
        return self.norms()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the number of steps, the history and the current window, without the
        update that follows the step just measured."""
        return checkpoint.saved(self.steps, self.history, self._window, self._outputs)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.remove()
        self._removed = False
        self.steps = state["steps"]
        self.history.clear()
        self.history.extend(checkpoint.readings(state))
        device = next(p.device for m in self._modules for p in m.parameters())
        checkpoint.restore(state, self._window, self._outputs, device)
        self._watch()

    def _measures(self, number: int) -> bool:
        """Whether a step of a window, counted from 1, is measured: the last one is, and others at
        distances as equal as integers allow."""
        back, stride = self.every - number, self.every // self.measure
        return back % stride == 0 and back // stride < self.measure

    def _watch(self) -> None:
        """Adds the forward hooks before a measured step and removes them after it."""
        measured = self.activations and self._measures(self.steps % self.every + 1)
        if measured and not self._hooks:
            looks = [(m, Look(row, self._outputs)) for row, m in enumerate(self._modules)]
            looks.append((self._model, Look(None, self._outputs)))
            self._hooks = [m.register_forward_hook(look) for m, look in looks]
        elif not measured and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    @torch.no_grad()
    def _measure(self) -> None:
        rows, shares, table = [], [], []
        found = with_gradients(self._modules)
        mesh = self._window.mesh = mesh_of([p for *_, p in found])
        for row, p, g, share, by_unit in gradients(self._modules, self.names, found, mesh):
            largest = None
            if by_unit and not g.is_sparse:
                largest = g.flatten(1).abs().amax(dim=1) if g.dim() > 1 else g.abs()
                self._window.add_units(row, largest, share)
            table += sums_of(g, largest)
            rows.append(row)
            shares.append(share)
            if self.updates:
                self._before.append((row, p, local(p).clone(), share))
        if rows:
            self._window.add(GRADIENT, rows, shares, table, inverse_scale(self.scaler))
        if seen := self._outputs.sums:
            rows, table = [row for row, _ in seen], [s for _, sums in seen for s in sums]
            self._called = list(dict.fromkeys(self._outputs.called))
            self._window.add(ACTIVATION, rows, [1 / self._window.ranks()] * len(rows), table)
        self._outputs.end_step()

    @torch.no_grad()
    def _after_the_update(self) -> None:
        """Measures the update that followed the last measured step. The copies become the
        differences."""
        weights = [local(p) for _, p, _, _ in self._before]
        copies = [copy for _, _, copy, _ in self._before]
        torch._foreach_sub_(copies, weights)
        rows, shares = [row for row, *_ in self._before], [share for *_, share in self._before]
        self._window.add_updates(rows, shares, squares_of([*copies, *weights]).view(2, -1).T)
        self._before = []

    @torch.no_grad()
    def _read(self) -> Reading:
        layers, update = tuple(map(Layer, self.names)), None
        if table := self._window.end(self._outputs.silent()):
            layers = tuple(layer_of(n, row) for n, row in zip(self.names, table, strict=True))
            update = root(sum(row[UPDATE] for row in table), sum(row[WEIGHT] for row in table))
        self._outputs.end_window()
        norms = [layer.norm for layer in layers if layer.norm is not None]
        norm = math.sqrt(sum(n * n for n in norms)) if norms else math.nan
        reading = Reading(self.steps, norm, update, layers)
        ordered = replace(reading, layers=in_order(layers, self._called))
        scaled = self.scaler is not None and self.scaler.is_enabled()
        verdicts = judge(ordered, self.history, self._normalised, scaled)
        reading = replace(reading, verdicts=tuple(verdicts))
        self.history.append(reading)
        if self.writer is not None and (
            not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        ):
            self.writer.write(reading)
        return reading
