"""Locate-then-edit methods: a value per fact by gradient descent, then a least-squares update."""
