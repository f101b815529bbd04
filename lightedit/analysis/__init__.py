"""Where a model keeps what it knows: causal tracing, hidden states, and the norms of updates."""
