"""The causal decoder. Knows torch, not DeepSpeed, files or text."""
