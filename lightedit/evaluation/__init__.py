"""Evaluation of a model or a method on facts: scores, comparisons, generated texts."""
