"""Where a model keeps what it knows: causal tracing."""
