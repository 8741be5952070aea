"""Compiles kernels for a GPU that this machine does not have, and reads the resources that they
take.

This needs no GPU and no data. An op runs on meta tensors: its launchers launch nothing but are
observed, and Triton compiles what they would have launched. Triton's interpreter must be off
(``TRITON_INTERPRET`` unset when the kernels are imported).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import selection
from ..backends.kernels import kernels
from ..backends.library import OPERATORS
from .case import outputs, weights_for
from .goals import ELEMENT, KB_IN_FLIGHT, NUMBER, NUMBER_IN_A_LOOP, RESIDENT, shortfall
from .sass import Pass, functions
from .spec import Make, OpSpec, Sample


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


def read_cubin(asm: Any) -> dict[str, int]:
    """Registers and local memory from the binary, instructions from the PTX."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        **read_usage(usage),
        **read_ptx(asm["ptx"]),
        "instructions": sum(f.instructions for f in functions(asm["cubin"])),
    }


def read_usage(usage: str) -> dict[str, int]:
    """Reads the output of ``cuobjdump --dump-resource-usage``."""

    def number(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage)[1])  # type: ignore[index]

    return {"registers": number("REG"), "spilled": number("STACK") + number("LOCAL")}


def read_ptx(ptx: str) -> dict[str, int]:
    """Loads and stores of global memory, by width, and atomics. An asynchronous copy to shared
    memory is a load; TMA is wide."""
    loads = [_bits(i) for i in re.findall(r"\bld(?:\.\w+)*\.global[\w.:]*", ptx)]
    loads += [
        8 * int(size, 0)
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;,]*,[^;,]*, *(\w+)", ptx)
    ]
    loads += [128] * len(re.findall(r"\bcp\.async\.bulk\S*\.shared\S*\.global", ptx))
    stores = [_bits(i) for i in re.findall(r"\bst(?:\.\w+)*\.global[\w.:]*", ptx)]
    stores += [128] * len(re.findall(r"\bcp\.async\.bulk\S*\.global\S*\.shared", ptx))
    return _counts(loads, stores, len(re.findall(r"\b(?:atom|red)\.", ptx)))


def _bits(instruction: str) -> int:
    """``ld.global.L1::evict_first.v4.b32`` -> 128."""
    vector, width = re.search(r"\.v(\d)\b", instruction), re.search(r"\.[bfsu](\d+)$", instruction)
    return (int(vector[1]) if vector else 1) * (int(width[1]) if width else 0)


def read_amdgcn(asm: Any) -> dict[str, int]:
    """Registers and scratch from the metadata at the end of the assembly, instructions from its
    text."""
    text = asm["amdgcn"]

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    width = {"dwordx4": 128, "b128": 128}
    loads = [
        width.get(w, 0)
        for w in re.findall(r"\b(?:global|buffer|flat)_load_(?:lds_)?([a-z\d]+)", text)
    ]
    stores = [
        width.get(w, 0) for w in re.findall(r"\b(?:global|buffer|flat)_store_([a-z\d]+)", text)
    ]
    return {
        "registers": note("vgpr_count"),
        "spilled": max(note("private_segment_fixed_size"), 4 * note("vgpr_spill_count")),
        **_counts(loads, stores, len(re.findall(r"\b(?:global|buffer|flat)_atomic_", text))),
        "instructions": len(re.findall(r"^\s+(?:[vs]|ds|global|buffer|flat)_\w", text, re.M)),
    }


def _counts(loads: list[int], stores: list[int], atomics: int) -> dict[str, int]:
    return {
        "loads": len(loads),
        "wide_loads": sum(bits >= 128 for bits in loads),
        "stores": len(stores),
        "wide_stores": sum(bits >= 128 for bits in stores),
        "atomics": atomics,
    }


class _Launching(TorchDispatchMode):
    """Inside, a primitive calls the launcher of its kernels, whatever the device of its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in OPERATORS:
            return func(*args, **kwargs or {})
        defaults = [
            a.default_value for a in func._schema.arguments[len(args) :]
        ]  # the dispatcher drops arguments that equal their defaults
        return OPERATORS[func].triton(*args, *defaults)

    def __enter__(self) -> Any:
        self._previous, selection._forced = selection._forced, "triton"
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        selection._forced = self._previous
        super().__exit__(*exception)


def launches(function: Callable[[], Any], target: str = "sm_90") -> list[Launch]:
    """The launches that ``function`` makes on meta tensors, for a GPU."""
    found: list[Launch] = []

    def observer(kernel: Any, programs: int, args: Any, constexprs: Any, options: Any) -> None:
        found.append(Launch(kernel, args, constexprs, options))

    launch, arch = kernels("launch"), TARGETS[target].arch
    capability = launch.meta_capability(arch if isinstance(arch, int) else 0)
    with capability, launch.observed(observer), _Launching():
        function()
    return found


class _Noting(TorchDispatchMode):
    """Notes the operators of torch that run a kernel of their own: they have a result with
    elements, that is neither a view nor left as it was allocated."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        results = result if isinstance(result, (tuple, list)) else (result,)
        if (
            any(isinstance(r, Tensor) and r.numel() for r in results)
            and not func.is_view
            and not re.match("aten.(new_)?(empty|detach)", str(func))
        ):
            self.found.append(str(func))
        return result


def launched(spec: OpSpec) -> tuple[list[str], list[str]]:
    """What a GPU runs for an op's large sample: our kernels and torch's operators, of forward with
    a gradient wanted, and of backward."""
    found: tuple[list[str], list[str]] = [], []
    sample = spec.large(Make("meta", torch.bfloat16), "large")
    given = [*sample.args, *sample.kwargs.values()]
    leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]

    def run(into: list[str], function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        def observer(kernel: Any, *_: Any) -> None:
            into.append(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}")

        with kernels("launch").observed(observer), _Noting(into), _Launching():
            return function(*args, **named)

    results = outputs(run(found[0], spec.function, *sample.args, **sample.kwargs))
    run(found[1], torch.autograd.grad, results, leaves, weights_for(results))
    return found


#: what an op is compiled for: the sizes are those of ``OpSpec.large``
REGIMES = [
    (torch.float64, "small"),
    *((d, size) for d in (torch.float32, torch.bfloat16) for size in ("small", "medium", "large")),
]


def both_ways(spec: OpSpec, sample: Sample) -> tuple[Tensor, ...]:
    """Runs the op without gradients, then forward and two backwards, one through a graph that is
    retained and one through a graph that is freed. Returns the outputs."""
    with torch.no_grad():
        spec.function(*sample.args, **sample.kwargs)
    results = outputs(spec.function(*sample.args, **sample.kwargs))
    dys = weights_for(results)
    torch.autograd.backward(results, dys, retain_graph=True)
    torch.autograd.backward(results, dys)
    return results


#: targets that kernels are compiled for in float64, which is there for gradcheck: of NVIDIA's one,
#: as all have the same registers
DOUBLE = ("sm_90", "gfx942")


def calls(spec: OpSpec, target: str = DOUBLE[0]) -> list[Callable[[], Any]]:
    """Calls of the op in each of :data:`REGIMES` and in the spec's own regimes, on meta tensors."""
    samples = [
        spec.large(Make("meta", dtype), size)
        for dtype, size in REGIMES
        if dtype != torch.float64 or target in DOUBLE
    ]
    for dtype in (torch.float64, torch.float32) if target in DOUBLE else (torch.float32,):
        samples += spec.regimes(Make("meta", dtype))  # half precision computes in float32
    return [partial(both_ways, spec, sample) for sample in samples]


#: rows that an op of rows is compiled for: one of each tile, those in a loop, and two whose length
#: leaves fewer numbers to an access
LENGTHS = (*(2**k for k in range(8, 19)), 1000, 50257)


def calls_by_length(spec: OpSpec) -> list[Callable[[], Any]]:
    """Calls of an op of rows on each of :data:`LENGTHS`, in bfloat16 on meta tensors."""
    make, call = Make("meta", torch.bfloat16), spec.by_length
    return [partial(both_ways, spec, call(make, 2**27 // n, n)) for n in LENGTHS] if call else []


def compile_op(spec: OpSpec, target: str) -> list[Resources]:
    """Compiles every kernel that an op launches in its :func:`calls`, for sm_90 also in its
    :func:`calls_by_length`."""
    by_length = calls_by_length(spec) if target == "sm_90" else []
    return compile_calls(calls(spec, target) + by_length, target)


def compile_calls(functions: Iterable[Callable[[], Any]], target: str) -> list[Resources]:
    """Compiles every kernel that these functions launch on meta tensors."""
    compiled: dict[Any, Launch] = {}
    for function in functions:
        for launch in launches(function, target):
            compiled.setdefault(_compile(launch, target), launch)
    return [_resources(launch, kernel, target) for kernel, launch in compiled.items()]
