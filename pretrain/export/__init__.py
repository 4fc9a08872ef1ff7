"""Run -> HF folder: fp32 weights, tokenizer, model card, and the proof that transformers loads what was trained."""
