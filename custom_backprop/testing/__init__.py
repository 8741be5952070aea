"""Proof: :func:`validate` for anybody's Function, kernel or module; the op database for our own."""

from .database import database
from .spec import Make, OpSpec, Sample

__all__ = ["Make", "OpSpec", "Sample", "database"]
