"""The card, or a CPU in its place: all that a measurement asks of the device.

A dry run takes the same way through everything else. It has toy sizes, one call in place of each
time, Triton's interpreter for our kernels and those of peers, and no graphs.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import custom_backprop
from custom_backprop.backends import use_backend
from custom_backprop.cli.work import interpreter
from custom_backprop.testing import interpreted
from custom_backprop.testing.interpreter.faster import remember_builtins

from .. import networks
from ..measure import Prepare, Recorded, Timer, clock, take_turns, waits
from ..report import card
from .peers import Peer

Call = Callable[..., Any]
#: a call, and what makes its arguments
Timed = tuple[Call, Prepare]


class Card:
    """A GPU.

    Attributes:
        elements: about how many numbers a large tensor has.
        lengths: of rows, the most important ones first.
        size: of :attr:`OpSpec.large`, of ops that are not measured by rows.
        product: the side of the matrices whose product is the ceiling.
        cache: bytes of the L2 cache.
        checks: of the database; None for all.
        backend: of ``torch.compile``.
        workers: so many processes compile and check at once.
    """

    kind = "cuda"
    dtypes = (torch.bfloat16, torch.float32)
    lengths: tuple[int, ...] = (
        4096, 2**16, 1024, 2**14, 2**18, 256, 2**15, 2**13, 2**17, 2048, 512,
    )  # fmt: skip
    product = 8192
    network = networks.LARGE
    checks: tuple[str, ...] | None = None
    backend = "inductor"
    #: seconds of a turn, and for each model
    turn, model_seconds = 2e-3, 4.0
    #: a call that takes more seconds at best, forward and backward, is not made
    longest = 0.2

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.name = card()
        self.memory: int = properties.total_memory
        self.cache: int = properties.L2_cache_size
        # ours, stock and the peers have two sets each of a few such tensors in float32
        self.elements = 2 ** min(26, (self.memory // 600).bit_length() - 1)
        self.size = "huge" if self.elements == 2**26 else "large"
        # each may have sixteen such tensors in float32, and the rest of the machine two cores
        self.workers = min((os.cpu_count() or 1) - 2, self.memory // (64 * self.elements))

    def machine(self, peers: list[Peer]) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            **self._hardware(),
            "torch": torch.__version__,
            "triton": _triton(),
            "python": platform.python_version(),
            "custom_backprop": custom_backprop.__version__,
            "code": _digest(),
            "date": time.strftime("%Y-%m-%d"),
            "peers": {peer.name: peer.version for peer in peers if peer.version},
        }

    def _hardware(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "card": properties.name,
            "memory": self.memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around everything."""
        yield

    @contextmanager
    def for_peers(self) -> Iterator[None]:
        """Around calls of other packages."""
        yield

    def timer(self, made: Callable[[], Timed]) -> Timer:
        """Of the GPU's own time; by the clock if the host waits for it in the call. ``made`` is
        asked again for each stream."""
        if waits(*made()):
            return _clock(self.kind, *made())
        return Recorded(*made())

    def host_timer(self, made: Callable[[], Timed]) -> Timer:
        """By the clock, until the GPU has finished several calls."""
        timer = _clock(self.kind, *made())
        timer(3)  # the first call compiles
        return timer

    def seconds(self, timers: Mapping[str, Timer]) -> dict[str, float]:
        """The medians of all timers, in turns."""
        if not timers:
            return {}
        slowest = max(timer(3) for timer in timers.values())
        calls, rounds = max(1, int(self.turn / slowest)), 7 if slowest < 0.05 else 3
        times = take_turns(list(timers.values()), rounds, calls)
        return dict(zip(timers, map(statistics.median, times), strict=True))

    def compiled(self, function: Call) -> Call:
        """``torch.compile``, for one shape at a time."""
        torch.compiler.reset()  # a function may be compiled for a few shapes only
        torch._functorch.config.donated_buffer = False  # so that a graph can be retained

        def called(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return torch.compile(called, dynamic=False, backend=self.backend)

    def captured(self, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Records a CUDA graph of a call; then each call is a replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()

        def replay() -> list[Tensor]:
            graph.replay()
            return [r.detach().clone() for r in results]

        return replay

    def free(self) -> None:
        """Gives back what a case has used."""
        torch.compiler.reset()
        torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether the card runs nothing more in this process, as after an access to memory that is
        not there; or draws no random numbers, as after a recording that failed."""
        try:
            torch.rand((), device=self.kind)
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


class DryRun(Card):
    """A CPU."""

    kind = "cpu"
    lengths = (256, 300)
    product = 64
    network = networks.QUICK
    checks = ("forward", "gradient", "gradcheck")
    backend = "eager"
    model_seconds = 0.0
    longest = math.inf

    def __init__(self) -> None:
        self.name, self.size, self.elements = "dry-run", "small", 2**10
        self.cache, self.workers = 2**10, 0

    def _hardware(self) -> dict[str, Any]:
        return {"card": "none: a dry run, whose figures mean nothing"}

    @contextmanager
    def ready(self) -> Iterator[None]:
        with interpreter(True), use_backend("triton"):  # before the first kernel is decorated
            remember_builtins()
            yield

    @contextmanager
    def for_peers(self) -> Iterator[None]:
        with interpreted():
            yield

    def timer(self, made: Callable[[], Timed]) -> Timer:
        return _clock(self.kind, *made())

    host_timer = timer

    def seconds(self, timers: Mapping[str, Timer]) -> dict[str, float]:
        return {who: timer(1) for who, timer in timers.items()}

    def captured(self, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        return call

    def free(self) -> None:
        torch.compiler.reset()

    def is_lost(self) -> bool:
        return False


def _clock(kind: str, call: Call, prepare: Prepare) -> Timer:
    return clock(call, kind, prepare)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.split("\n")[0].strip()


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _digest() -> str:
    """Of the sources of the package and of its kernels."""
    package = Path(custom_backprop.__file__).parent
    kernels = Path(__file__).parents[2] / "triton_kernels"
    found = hashlib.sha256()
    for folder in (package, kernels):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:12]
