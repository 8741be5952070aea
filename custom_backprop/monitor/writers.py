"""Writers of readings."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .reading import Reading


class Writer(Protocol):
    """Gets each reading as soon as there is one."""

    def write(self, reading: Reading) -> None: ...


class JSONLines:
    """Appends one line of JSON per reading to ``path``: step, norm, update, verdicts, and with
    ``layers`` the statistics of each layer. NaN becomes null."""

    def __init__(self, path: str | Path, layers: bool = False) -> None:
        self.path, self.layers = Path(path), layers

    def write(self, reading: Reading) -> None:
        scalars = {
            k: v if math.isfinite(v) else None for k, v in reading.scalars(self.layers).items()
        }
        verdicts = [{**asdict(v), "cure": v.cure} for v in reading.verdicts]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": reading.step, **scalars, "verdicts": verdicts}, allow_nan=False)
                + "\n"
            )


class TensorBoard:
    """Scalars ``gradients/norm``, ``gradients/update`` and, if ``layers``,
    ``gradients/LAYER/STATISTIC``; the verdicts as text.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path, layers: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "writing for TensorBoard needs: pip install tensorboard (or use JSONLines)"
            ) from error
        self._open, self.directory, self.layers = SummaryWriter, str(directory), layers
        self._writer: Any = None

    def write(self, reading: Reading) -> None:
        if self._writer is None:
            self._writer = self._open(self.directory)
        for name, value in reading.scalars(self.layers).items():
            self._writer.add_scalar(f"gradients/{name}", value, reading.step)
        if reading.verdicts:
            self._writer.add_text(
                "gradients/verdicts", "\n\n".join(map(str, reading.verdicts)), reading.step
            )
        self._writer.flush()
