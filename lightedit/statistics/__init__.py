"""Covariances: second moments of keys over text, which locate-then-edit methods read."""
