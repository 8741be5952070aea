"""Backpropagation written out: layers whose backward is an explicit formula, run by Triton kernels,
proved against autograd."""

from . import functional, init, monitor, nn, optim, testing
from .backends import get_backend, use_backend
from .convert import convert, revert

__version__ = "0.1.0"

__all__ = [
    "convert",
    "functional",
    "get_backend",
    "init",
    "monitor",
    "nn",
    "optim",
    "revert",
    "testing",
    "use_backend",
]
