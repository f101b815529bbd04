"""Knowledge neurons: the MLP activations to which an answer's probability is attributed, and edits of their values."""
