"""Ops that published packages of Triton kernels export, with references in plain torch: what
``benchmarks/peers_validated.py`` validates."""

from __future__ import annotations

from . import fla, liger
from .op import Op

OPS: list[Op] = [*liger.OPS, *fla.OPS]

__all__ = ["OPS", "Op"]
