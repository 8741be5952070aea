"""An op of another package, as source text: what is validated is what a reader can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        package: its name on the package index.
        name: the op's own.
        imports: the statement that imports it.
        function: a callable of the inputs.
        inputs: a list of tensors. Those of floating point are differentiated unless ``leaves``
            says how many.
        reference: the same function in plain torch.
        leaves: how many of the inputs are differentiated, from the first; None for all.
        unavailable: why this op cannot run here, if that is known.
    """

    package: str
    name: str
    imports: str
    function: str
    inputs: str
    reference: str
    leaves: int | None = None
    unavailable: str = ""
    pretend_cuda: bool = False
    """it asks whether there is a GPU"""

    @property
    def key(self) -> str:
        return f"{self.package}:{self.name}"

    def setup(self) -> str:
        """The lines that define ``function``, ``reference`` and ``inputs``."""
        lines = [
            "import torch",
            "import torch.nn.functional as F",
            "from torch import arange, rand, randint, randn, tensor",
            self.imports,
            "",
            "torch.manual_seed(0)",
            f"function = {self.function}",
            f"reference = {self.reference}",
            f"inputs = {self.inputs}",
        ]
        if self.leaves is not None:
            lines.append(f"for x in inputs[:{self.leaves}]:\n    x.requires_grad_()")
        return "\n".join(lines)

    def script(self, checks: list[str]) -> str:
        """A script that validates the op."""
        return (
            f"{self.setup()}\n\n"
            "from custom_backprop.testing import interpreted, validate\n\n"
            f"with interpreted({'pretend_cuda=True' * self.pretend_cuda}):\n"
            "    print(validate(function, inputs, reference, dtype=torch.float32, "
            f"low_precision=(torch.float32,),\n                   checks={checks}))\n"
        )

    def load(self) -> dict[str, Any]:
        """``function``, ``reference`` and ``inputs``."""
        space: dict[str, Any] = {}
        exec(self.setup(), space)
        return space
