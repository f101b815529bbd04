"""Editing in a stream: facts come one after the other, and what was known and written before is scored again."""
