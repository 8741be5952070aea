"""What launchers ask a GPU and its driver, answered on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CAPABILITY = 8, 0
#: few, so that a persistent kernel's programs have several turns
MULTIPROCESSORS = 4

PROPERTIES = SimpleNamespace(
    name="interpreted",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=MULTIPROCESSORS,
    total_memory=80 * 2**30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=163 * 1024,
    shared_memory_per_multiprocessor=164 * 1024,
    L2_cache_size=40 * 2**20,
    gcnArchName="",
)


class _Device:
    """``torch.cuda.device``, ``torch.cuda.device_of`` and ``torch.cuda.stream``: nothing to
    change."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Driver:
    """``triton.runtime.driver.active``."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
                "max_num_regs": PROPERTIES.regs_per_multiprocessor,
                "multiprocessor_count": MULTIPROCESSORS,
                "warpSize": 32,
                "sm_clock_rate": 1_400_000,
                "mem_clock_rate": 1_200_000,
                "mem_bus_width": 5120,
            }
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        def once(call: Any, *_: Any, **__: Any) -> list[float]:
            call()
            return [0.0, 0.0, 0.0]

        return once


@contextmanager
def patched() -> Iterator[None]:
    """Answers where torch or triton would raise for want of a GPU; with a real one, none."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.driver import driver

    answers: dict[str, Any] = {
        "device": _Device,
        "device_of": _Device,
        "stream": _Device,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0, device_index=0),
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
    }
    with ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(patch.object(torch.cuda, name, answer))
        patches.enter_context(patch.object(driver, "_active", _Driver()))
        yield


@contextmanager
def pretended() -> Iterator[None]:
    """CPU tensors say that they are on a GPU, and "cuda" means the CPU."""
    if torch.cuda.is_available():
        yield
        return
    with ExitStack() as patches:
        patches.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
        patches.enter_context(patch.object(torch.cuda, "device_count", lambda: 1))
        patches.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
        patches.enter_context(
            patch.object(torch.Tensor, "is_cuda", property(lambda t: True), create=True)
        )
        patches.enter_context(_OnTheCPU())
        yield


class _OnTheCPU(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        args = tuple(map(_here, args))
        return func(*args, **{name: _here(value) for name, value in (kwargs or {}).items()})


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value
