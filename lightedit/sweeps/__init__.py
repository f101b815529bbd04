"""Sweeps: many runs over counts of facts, methods and settings, with one table and one figure."""
