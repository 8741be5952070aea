"""The bounds that docs/architecture.md states."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import custom_backprop
from custom_backprop.testing import Make, database

ROOT = Path(custom_backprop.__file__).parent
#: functions and files: of an op, and of a loss, which also checks more, and decides whether to make
#: its gradient in forward
LIMIT, OF_A_LOSS = (8, 5), (16, 8)
LOSSES = {"loss", "nll", "cross_entropy", "contrastive"}


def entered(call: Callable[[], Any]) -> list[str]:
    """The files of ours whose functions a call enters before it comes to an implementation, one
    entry a function."""
    files: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and code.co_name[0] != "<":
            files.append(str(Path(code.co_filename).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    shared = {"backends/library.py", "backends/selection.py"}
    return [f for f in files if f.startswith(("functional", "ops")) or f in shared]


@pytest.mark.parametrize("name", [n for n in database() if n != "info_nce"])  # which is three ops
def test_a_forward_enters_few_functions_of_ours_in_few_files(name):
    spec = database()[name]
    functions, several = OF_A_LOSS if spec.family in LOSSES else LIMIT
    sample = spec.large(Make("cpu", torch.float32), "small")
    spec.function(*sample.args, **sample.kwargs)  # what is imported or cached at the first call
    files = entered(lambda: spec.function(*sample.args, **sample.kwargs))
    assert len(files) <= functions, files
    assert len(set(files)) <= several, files
