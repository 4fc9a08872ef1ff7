"""Corpus -> token files in Megatron's format -> blocks in the order of training."""
