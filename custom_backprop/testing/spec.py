"""What each op states about itself. Tests, ``check``, ``kernels``, benchmarks and the table in the
docs all use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: the shapes of large samples for elementwise ops
ELEMENTWISE_SIZES = {
    "awkward": (131, 257),
    "small": (64, 64),
    "medium": (256, 256),
    "large": (1024, 1024),
    "huge": (16384, 4096),
}


@dataclass(frozen=True)
class Sample:
    """One call of an op: positional arguments (tensors and plain values) and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""


class Make:
    """Makes the tensors of a sample: reproducible, on one device, with one dtype.

    Args:
        device: that of the tensors.
        dtype: the floating-point dtype of :meth:`tensor`.
        seed: the same seed gives the same values on every device (they are drawn on the CPU in
            float64).
        there: draw on the device itself, which gives other values but is fast for gigabytes.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        *,
        there: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._drawn_on = self.device if there or self.device.type == "meta" else torch.device("cpu")
        self._generator = torch.Generator(
            "cpu" if self.device.type == "meta" else self._drawn_on
        ).manual_seed(seed)

    def tensor(
        self,
        *shape: int,
        low: float = -3.0,
        high: float = 3.0,
        avoid: Iterable[float] = (),
        requires_grad: bool = True,
    ) -> Tensor:
        """Uniform in [low, high), with no value nearer than 0.05 to one of ``avoid`` (the kinks,
        where there is no derivative)."""
        t = torch.empty(shape, dtype=torch.float64, device=self._drawn_on).uniform_(
            low, high, generator=self._generator
        )
        for kink in avoid:
            t = torch.where((t - kink).abs() < 0.05, t + 0.1, t)
        return t.to(self.device, self.dtype).requires_grad_(requires_grad)

    def index(self, *shape: int, high: int, low: int = 0) -> Tensor:
        """Integers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self._generator, device=self._drawn_on).to(
            self.device
        )

    def probabilities(self, *shape: int, dim: int = -1, requires_grad: bool = True) -> Tensor:
        """Positive numbers that sum to one along ``dim``."""
        t = torch.empty(shape, dtype=torch.float64, device=self._drawn_on).uniform_(
            0.1, 1.0, generator=self._generator
        )
        return (
            (t / t.sum(dim, keepdim=True)).to(self.device, self.dtype).requires_grad_(requires_grad)
        )


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: its name in :mod:`custom_backprop.functional`.
        family: the name of its file in every package.
        formula: forward and backward in one line, as ``check`` prints it.
        function: ours.
        reference: stock torch with the same signature: the oracle (in float64) and the yardstick
            (in each dtype).
        samples: small inputs that use every argument and awkward sizes. The op must be smooth at
            their values, as gradcheck needs.
        large: ``large(make, size)``. The benchmarks run the sizes "small" (about 4k elements),
            "medium" (about 64k) and "large" (1M and more), and on a GPU "huge" (64M and more).
            ``kernels`` compiles for these sizes, on meta tensors. The audit runs "awkward": work
            for several programs, with no side a multiple of a block.
        by_length: ``by_length(make, rows, n)``, a call on so many rows of n numbers, of an op whose
            speed depends on n. ``benchmarks.gpu`` runs it for n from 256 to 262144; ``kernels``
            compiles it for them, for sm_90, and counts how busy each keeps the memory.
        regimes: large inputs that only ``kernels`` compiles for. With ``large``, they reach every
            branch of the launchers.
        module: (our class, torch's class, arguments of the constructor, the modules' inputs from a
            ``Make``), for the tests of drop-in modules. No argument has its default value, so that
            a test notices one that is ignored.
        module_variants: further arguments of the constructor, if one set cannot have them all.
        double_backward: False if the op has no second derivative; then create_graph raises.
        low_precision: the dtypes below float64 in which torch supports this op.
        batched: False if vmap cannot batch torch's own op either (data-dependent shapes).
        elementwise: each element of the result depends only on the same element of its one tensor.
            Every 16-bit number is then tried.
        rows: positions of the arguments of ``large``, of shape (rows, ...), whose rows do not
            depend on one another, to the last bit on every backend.
        excused: (backend, check) -> why it may fail there; an empty backend means all.
        read_twice: sums over more numbers than a program holds stand between two readings of what
            goes in, in both directions; counted in the floor of its traffic.
        launches: how many kernels a GPU runs for forward, with a gradient wanted, and for backward,
            as Triton has them: one each, or so many that any more is noticed.
        gathers: it reads only a part of what it gets, so those bytes are no floor of its traffic.
        representative: it represents similar ops in tests that are too slow to run on all: Inductor
            and compiled transformations.
    """

    name: str
    family: str
    formula: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[Make], Iterable[Sample]]
    large: Callable[[Make, str], Sample]
    module: tuple[type, type, dict[str, Any], Callable[[Make], tuple[Any, ...]]] | None = None
    by_length: Callable[[Make, int, int], Sample] | None = None
    double_backward: bool = True
    regimes: Callable[[Make], Iterable[Sample]] = lambda make: ()
    low_precision: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    batched: bool = True
    elementwise: bool = False
    rows: tuple[int, ...] = ()
    excused: dict[tuple[str, str], str] = field(default_factory=dict)
    read_twice: bool = False
    launches: tuple[int, int] = (1, 1)
    gathers: bool = False
    representative: bool = False
    module_variants: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name
