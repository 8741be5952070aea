"""Proof: :func:`validate` for any Function, kernel or module; :func:`bisect` for a whole model;
the database of our own ops; the resources that a kernel takes, the memory that it accesses and the
bytes that it moves."""

from .audit import Audit, AuditedLaunch, audit
from .bisect import Bisection, Layer, bisect
from .checks import CHECKS
from .database import cases, check_op, database
from .inputs import Inputs
from .interpreter import interpreted
from .launches import record_launches
from .memory import peak_memory
from .offline import TARGETS, Resources, compile_launches, compile_offline
from .record import Recording, record
from .report import Report, Result
from .spec import Make, OpSpec, Sample
from .target import own_forward
from .traffic import Traffic, traffic
from .validate import validate

__all__ = [
    "CHECKS",
    "TARGETS",
    "Audit",
    "AuditedLaunch",
    "Bisection",
    "Inputs",
    "Layer",
    "Make",
    "OpSpec",
    "Recording",
    "Report",
    "Resources",
    "Result",
    "Sample",
    "Traffic",
    "audit",
    "bisect",
    "cases",
    "check_op",
    "compile_launches",
    "compile_offline",
    "database",
    "interpreted",
    "own_forward",
    "peak_memory",
    "record",
    "record_launches",
    "traffic",
    "validate",
]
