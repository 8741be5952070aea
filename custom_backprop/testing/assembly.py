"""Reads what a compiled kernel takes: its registers, its local memory and its instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from .sass import functions


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
