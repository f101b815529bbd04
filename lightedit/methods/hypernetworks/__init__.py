"""Hyper-networks: trained networks that turn the gradient of a fact's loss into an edit (KE, MEND)."""
