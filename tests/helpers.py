"""What tests of several folders use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import custom_backprop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
