"""Errors where torch swaps or compiles modules by their exact class, and so must not get ours."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def _script(module: torch.nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(module).__name__} of custom_backprop, whose "
        "backward is a Python Function: custom_backprop.revert(model) first"
    )


def _no_configuration(module: torch.nn.Module) -> NoReturn:
    raise AttributeError("qconfig")


def _configure(module: torch.nn.Module, configuration: Any) -> NoReturn:
    raise RuntimeError(
        f"torch.ao.quantization knows torch's own classes, and would leave {type(module).__name__} "
        "of custom_backprop as it is: custom_backprop.revert(model) first"
    )


def refuse(module: type) -> None:
    """Makes ``torch.jit.script`` and ``torch.ao.quantization`` raise for a class of ours."""
    module.__prepare_scriptable__ = _script  # type: ignore[attr-defined]
    module.qconfig = property(_no_configuration, _configure)  # type: ignore[attr-defined]
