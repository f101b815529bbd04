"""Sweeps: many runs over counts of facts, methods and settings, with one table and one figure."""

from lightedit.sweep.plan import LOG17
from lightedit.sweep.run import sweep

__all__ = ["LOG17", "sweep"]
