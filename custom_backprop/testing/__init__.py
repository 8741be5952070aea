"""Proof: :func:`validate` for anybody's Function, kernel or module; the op database for our own."""

from .checks import CHECKS
from .database import cases, check_op, database
from .spec import Make, OpSpec, Sample
from .validate import Report, Result, validate

__all__ = ["CHECKS", "Make", "OpSpec", "Report", "Result", "Sample", "cases", "check_op", "database", "validate"]
