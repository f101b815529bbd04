"""Training of small models that editors are tried on: a classifier on an encoder, and a T5."""
