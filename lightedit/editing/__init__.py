"""Runs that write facts into a model, and the edits that they produce."""
