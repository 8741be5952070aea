"""Backpropagation written out: layers whose backward is an explicit formula, run by Triton kernels, proved against autograd."""

from . import functional, nn, testing
from .backends import get_backend, use_backend

__version__ = "0.1.0"

__all__ = ["functional", "get_backend", "nn", "testing", "use_backend"]
