"""Shapes of the decoder, and BioGPT's."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

VOCABULARY_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of it: matrix units want round sizes."""
Recomputation = Literal["none", "selective", "full"]
Boundaries = Literal["none", "document"]
Initialization = Literal["fairseq", "hf"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder. Names and defaults are those of transformers' `BioGptConfig`. Raises ValueError on a bad shape."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    """Probability that a layer is skipped in a training step (Fan, Grave and Joulin 2020)."""
    layerdrop_seed: int = 0
    gradient_checkpointing: Recomputation = "none"
    """"full": recompute each layer in the backward pass instead of keeping its activations. "selective": recompute
    layer norms, GELU and its dropout alone, keep what a matrix product or attention gave (Korthikanti et al. 2022)."""
    boundaries: Boundaries = "none"
    """"document": attention stays inside a document, and positions begin anew with each."""
    initialization: Initialization = "fairseq"
    """"fairseq": the original BioGPT's; "hf": transformers' N(0, 0.02)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size}: not divisible by num_attention_heads = {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1")
        choices = {"gradient_checkpointing": Recomputation, "boundaries": Boundaries, "initialization": Initialization}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose from {', '.join(get_args(known))}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding inside; the exported one has `vocab_size`."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def parameter_count(self) -> int:
        """Parameters of the exported model, the tied head counted once."""
        width, feed_forward = self.hidden_size, self.intermediate_size
        layer = 4 * width * (width + 1) + 2 * width * feed_forward + feed_forward + width + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings + 2) * width
        return embeddings + self.num_hidden_layers * layer + 2 * width


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 128,
    },
    "biogpt": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 1024,
    },
    "biogpt-large": {
        "hidden_size": 1600,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "intermediate_size": 6400,
        "max_position_embeddings": 2048,
    },
}
"""Shapes by name; the vocabulary comes from the shards."""
