"""Text <-> ids: Moses, BPE, the tokenizer and its `tokenizer.json`."""
