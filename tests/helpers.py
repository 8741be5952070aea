"""What tests of several folders use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import custom_backprop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 300  # a launch of several processes that takes longer counts as hung


def assert_is_a_picture(path: Path) -> None:
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    assert 300 < height < 2000
    assert 600 < width < 3000
    assert imread(path).std() > 0.05


def python(code: str, **environment: str) -> str:
    """What a process of its own prints, without the interpreter's setting of these tests."""
    root = str(Path(custom_backprop.__file__).parents[1])
    env = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": root}
        | environment
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A process without the settings for Triton of tests/conftest.py. Neither it nor its children
    outlive the block."""
    root = str(Path(custom_backprop.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "error::UserWarning",
    }
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, **pipes
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def output_of(process: subprocess.Popen[str]) -> str:
    """What the process prints. It must end well."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return output
