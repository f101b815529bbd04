"""A run that writes facts into a model, and what comes of it."""
