"""What a model, or a method, is worth on facts: scores, comparisons, free texts."""
