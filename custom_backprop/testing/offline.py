"""Compiles kernels for a GPU that this machine does not have, and reads the resources that they
take.

This needs no GPU and no data. Triton's interpreter must be off (``TRITON_INTERPRET`` unset when the
kernels are imported).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from ..backends.kernels import kernels
from .assembly import read_amdgcn, read_cubin
from .goals import ELEMENT, KB_IN_FLIGHT, NUMBER, NUMBER_IN_A_LOOP, RESIDENT, shortfall
from .sass import Pass, functions


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's (backend, arch, warp size), and the bytes of shared memory
    that one block may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by position and by name, its compile-time arguments and
    Triton's own."""

    kernel: Any
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, int]
    named: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled kernel, as reported by the assembler and as found in its code.

    Attributes:
        signature: the type of each argument that is passed at run time.
        constants: the compile-time arguments.
        spilled: bytes of local memory per thread.
        shared: bytes of shared memory per block.
        loads, stores: instructions to global memory; ``wide`` ones move 128 bits or more per
            thread.
        atomics: atomic instructions.
        instructions: all of a thread, those of a loop once.
        per_element: on sm_90, instructions an element of an elementwise kernel (``pointwise.py``)
            of 16-bit numbers; else 0.
        passes: on sm_90, what a kernel on 16-bit numbers takes in each of its innermost loops, or
            without one in all; of no kernel that multiplies matrices.
    """

    kernel: str
    target: str
    signature: str
    constants: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    atomics: int
    instructions: int = 0
    per_element: float = 0.0
    passes: tuple[Pass, ...] = ()

    @property
    def per_number(self) -> list[float]:
        """Instructions of each pass for each 16-bit number that it loads or stores."""
        return [p.per_number(2) for p in self.passes]

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor of sm_90 has at once: of 64 warps, 65536 registers and 228
        KB of shared memory. A warp takes multiples of 256 registers, a program 1 KB of its own."""
        registers = -(-self.registers // 8) * 256 * self.num_warps
        return min(32, 64 // self.num_warps, 65536 // registers, 228 * 1024 // (self.shared + 1024))

    @property
    def in_flight(self) -> list[int]:
        """Bytes that the loads under way bring to a multiprocessor, in each pass."""
        return [self.resident * 32 * self.num_warps * p.in_flight for p in self.passes if p.loaded]

    @property
    def figures(self) -> dict[str, float]:
        """What has one of the :data:`~.goals.GOALS`: the worst of the passes."""
        found = {ELEMENT: self.per_element} if self.per_element else {}
        for p, number in zip(self.passes, self.per_number, strict=True):
            what = NUMBER_IN_A_LOOP if p.loop else NUMBER
            found[what] = max(found.get(what, 0.0), number)
        if self.in_flight:
            found[RESIDENT] = self.resident
            found[KB_IN_FLIGHT] = min(self.in_flight) / 1024
        return found

    @property
    def kind(self) -> str:
        """The kernel, and whether none of its accesses has 128 bits, which changes its figures."""
        return self.kernel + ("" if self.wide_loads or self.wide_stores else ", narrow")

    @property
    def faults(self) -> list[str]:
        """Why this kernel is not good enough to ship; empty if it is."""
        limit = TARGETS[self.target].shared
        found = []
        if self.spilled:
            found.append(
                f"{self.spilled} bytes of local memory per thread (spilled registers, or an array "
                "on the stack)"
            )
        if self.atomics:
            found.append(
                f"{self.atomics} atomic instructions: the order of a sum, and so its bits, would "
                "differ from run to run"
            )
        if self.shared > limit:
            found.append(
                f"{self.shared} bytes of shared memory, where a block of {self.target} has {limit}"
            )
        return found

    @property
    def shortfalls(self) -> list[str]:
        """Where a kernel of ours is short of its goals, more than is known."""
        figures = self.figures.items()
        return [s for what, value in figures if (s := shortfall(self.kind, what, value))]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "faults": self.faults + self.shortfalls}


def compile_offline(
    kernel: Any,
    *args: Any,
    target: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 3,
    **constexprs: Any,
) -> Resources:
    """Compiles one launch of a ``@triton.jit`` kernel, for a GPU that the machine need not have.

    Args:
        args: the runtime arguments of a launch. Tensors may be meta tensors, which count as aligned
            to 16 bytes. Integers are specialised on their value as at a real launch (1, multiples
            of 16).
        target: one of ``sm_80``, ``sm_90``, ``sm_100``, ``gfx942``.

    Raises:
        ValueError: an unknown target.
        RuntimeError: the kernel was decorated while Triton's interpreter was on.
    """
    launch = Launch(kernel, args, constexprs, {"num_warps": num_warps, "num_stages": num_stages})
    return _resources(launch, _compile(launch, target), target)


def compile_launches(launches: Iterable[Launch], target: str = "sm_90") -> list[Resources]:
    """Compiles launches for a GPU that this machine need not have. Those that Triton does not
    distinguish are compiled once.

    Args:
        target: one of :data:`TARGETS`.

    Raises:
        ValueError: an unknown target.
        RuntimeError: a kernel was decorated with ``TRITON_INTERPRET=1``, which
            :func:`interpreted` does not need.
    """
    kernels("launch")  # settles what Triton would warn of
    compiled: dict[Any, Launch] = {}
    for launch in launches:
        compiled.setdefault(_compile(launch, target), launch)
    return [_resources(launch, kernel, target) for kernel, launch in compiled.items()]


def _compile(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel. Launches that Triton does not distinguish get the same object."""
    from triton.runtime.jit import JITFunction

    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose among {', '.join(TARGETS)}")
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            f"{launch.kernel.__name__} was decorated with TRITON_INTERPRET=1: only the interpreter "
            "can run it"
        )
    with _pretending(TARGETS[target]):
        return launch.kernel.warmup(
            *launch.args, grid=(1,), **launch.named, **launch.constexprs, **launch.options
        )


def _resources(launch: Launch, compiled: Any, target: str) -> Resources:
    cuda = TARGETS[target].backend == "cuda"
    read = (read_cubin if cuda else read_amdgcn)(compiled.asm)
    warps = launch.options.get("num_warps", 4)
    family = launch.kernel.__module__.rpartition(".")[2]
    signature = [t for t in compiled.src.signature.values() if t != "constexpr"]
    halves = signature[0] in ("*bf16", "*fp16") and target == "sm_90"
    multiplies = halves and "mma" in compiled.asm["ptx"]
    return Resources(
        kernel=f"{family}.{launch.kernel.__name__}",
        target=target,
        signature=", ".join(signature),
        constants=", ".join(
            f"{k}={getattr(v, '__name__', v)}" for k, v in launch.constexprs.items()
        ),
        num_warps=warps,
        shared=compiled.metadata.shared,
        per_element=read["instructions"] * 32 * warps / launch.constexprs["BLOCK"]
        if halves and family == "pointwise"
        else 0.0,
        passes=tuple(p for f in functions(compiled.asm["cubin"]) for p in f.passes())
        if halves and not multiplies
        else (),
        **read,
    )


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    """Inside, Triton's driver has the target as its only device. That is all that Triton needs to
    compile."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    previous = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: gpu,
            get_current_target=lambda: gpu,
            get_current_stream=lambda device: 0,
        )
    )
    try:
        yield
    finally:
        driver.set_active(previous)
