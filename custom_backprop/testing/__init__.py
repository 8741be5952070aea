"""Proof: :func:`validate` for anybody's Function, kernel or module; the op database for our own;
what a kernel takes and touches."""

from .audit import Audit, AuditedLaunch, audit
from .checks import CHECKS
from .database import cases, check_op, database
from .memory import peak_memory
from .offline import TARGETS, Resources, compile_offline
from .spec import Make, OpSpec, Sample
from .validate import Report, Result, validate

__all__ = [
    "CHECKS",
    "TARGETS",
    "Audit",
    "AuditedLaunch",
    "Make",
    "OpSpec",
    "Report",
    "Resources",
    "Result",
    "Sample",
    "audit",
    "cases",
    "check_op",
    "compile_offline",
    "database",
    "peak_memory",
    "validate",
]
