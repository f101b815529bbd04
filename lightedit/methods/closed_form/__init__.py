"""Locate-then-edit methods: gradient descent finds a value per fact, then a least-squares update writes the values."""
