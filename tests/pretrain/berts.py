"""Folders of a tiny BERT or BertGenerationEncoder: random weights of transformers' classes, a WordPiece tokenizer."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertGenerationConfig, BertGenerationEncoder, BertModel

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.digits, ".", ",", "?"]
VOCABULARY = [*PIECES, *(f"##{letter}" for letter in string.ascii_lowercase), "kalitinib", "causes", "asthma", "fever"]
SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
}


def save_bert(folder: Path, generation: bool = False, **changes: Any) -> Path:
    """A folder with `model_type` bert, or bert-generation."""
    torch.manual_seed(3)
    shape = SHAPE | changes
    model = BertGenerationEncoder(BertGenerationConfig(**shape)) if generation else BertModel(BertConfig(**shape))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in VOCABULARY))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder
