"""Prints what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..backends import BACKENDS, PRIMITIVES, interpreting, why_not
from ..testing import TARGETS, database
from ..testing.checks.traced import cpp_compiler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Returns 0."""
    families: dict[str, list[str]] = {}
    for spec in database().values():
        families.setdefault(spec.family, []).append(spec.name)
    sections: dict[str, list[list[str]]] = {
        "versions": [
            ["custom_backprop", __version__],
            ["python", platform.python_version()],
            *([p, _version(p)] for p in PACKAGES),
        ],
        "devices": _devices(),
        "backends": [[f"{b} on {d}", _runs(b, d)] for d in ("cpu", "cuda") for b in BACKENDS],
        "tools": [
            [
                "interpreter",
                f"{'on' if interpreting() else 'off'} "
                f"(TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')})",
            ],
            ["inductor", _inductor()],
            ["offline compiler", _offline()],
        ],
        f"ops ({sum(map(len, families.values()))}, of {len(PRIMITIVES)} primitives)": [
            [f, ", ".join(names)] for f, names in families.items()
        ],
    }
    width = max(len(row[0]) for rows in sections.values() for row in rows)
    for title, rows in sections.items():
        print(title)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}")
    return 0


PACKAGES = ("torch", "triton", "numpy")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[list[str]]:
    found = [
        ["cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            [
                f"cuda:{i}",
                f"{p.name}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory / 2**30:.0f} GiB",
            ]
        )
    if len(found) == 1:
        found.append(["cuda", _no_gpu()])
    return found


def _no_gpu() -> str:
    return (
        "no GPU is visible"
        if torch.version.cuda or torch.version.hip
        else "this torch was built without CUDA and ROCm"
    )


def _runs(backend: str, device: str) -> str:
    reason = (
        _no_gpu()
        if device == "cuda" and not torch.cuda.is_available()
        else why_not(backend, device)
    )
    if reason is not None:
        return f"no: {reason}"
    default = "triton" if device == "cuda" and why_not("triton", device) is None else "aten"
    return "yes, the default" if backend == default else "yes"


def _inductor() -> str:
    compiler = cpp_compiler()
    if compiler is None:
        return "no on the CPU: no working C++ compiler was found (set CXX)"
    return f"yes, C++ compiler {compiler}"


def _offline() -> str:
    if find_spec("triton") is None:
        return "no: the package triton is not installed"
    from triton import knobs

    tools = [knobs.nvidia.ptxas.path, knobs.nvidia.cuobjdump.path]
    missing = [t for t in tools if not Path(t).is_file()]
    return f"no: {', '.join(missing)} is missing" if missing else f"yes, for {', '.join(TARGETS)}"
