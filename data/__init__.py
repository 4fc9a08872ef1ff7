"""PubMed to shards: archive, corpus, tokenizer, token files and training blocks. Knows text and numbers, not models."""
