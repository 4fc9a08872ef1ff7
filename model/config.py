"""The shapes of models, and the published shapes of BioGPT."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

VOCABULARY_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this, because matrix units are fastest with round sizes."""
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}
"""Logits in a chunk of the loss, by the type of device: enough that adding up the weight's gradient costs little beside
the matrix products."""
COMPILED_CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**29}
"""The same if the chunk is compiled, which holds them in half precision alone."""
CACHED_LOGITS = 2**18
"""Logits of a chunk that a CPU works on at a time: 1 MB in fp32."""
Recomputation = Literal["none", "selective", "full"]
Boundaries = Literal["none", "document"]
Initialization = Literal["fairseq", "hf"]
Problem = Literal["tokens", "single", "multiple"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of one decoder. Names and defaults are those of transformers' `BioGptConfig`.

    Raises ValueError that names the first field with a bad value. A checkpoint that lacks a field was made when the
    field did not exist, and means its default.
    """

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
    """Seed of the draws that decide which layers are skipped."""
    gradient_checkpointing: Recomputation = "none"
    """"full": recompute each layer in the backward pass instead of keeping its activations. "selective": recompute
    only layer norms, GELU and its dropout, and keep the results of matrix products and attention (Korthikanti et al.
    2022)."""
    boundaries: Boundaries = "none"
    """"document": attention stays inside a document, and positions start again at each document."""
    initialization: Initialization = "fairseq"
    """"fairseq": as the original BioGPT; "hf": transformers' N(0, 0.02)."""
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    """`</s>` stands before the first token of a document."""

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
        """Rows of the embedding while training. The exported embedding has `vocab_size` rows."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def parameter_count(self) -> int:
        """Number of parameters of the exported model, with the tied head counted once."""
        width, feed_forward = self.hidden_size, self.intermediate_size
        layer = 4 * width * (width + 1) + 2 * width * feed_forward + feed_forward + width + 4 * width
        embeddings = (self.vocab_size + self.max_position_embeddings + 2) * width
        return embeddings + self.num_hidden_layers * layer + 2 * width

    def flops_per_token(self, context_length: int) -> float:
        """Floating point operations to train on one token: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.parameter_count() + 12 * self.num_hidden_layers * self.hidden_size * context_length


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(DecoderConfig):
    """The shape of a decoder with a classification head."""

    labels: list[str]
    """The names of the classes, in the order of the head's outputs."""
    problem: Problem
    """"tokens": a class for each token. "single": one class for a text. "multiple": any number of them for a text."""

    def parameter_count(self) -> int:
        """Number of parameters of the exported model."""
        bias = self.problem == "tokens"  # as in transformers
        return super().parameter_count() + len(self.labels) * (self.hidden_size + bias)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(DecoderConfig):
    """The shape of an encoder and a decoder of the same layers. `num_hidden_layers` are the decoder's."""

    num_encoder_layers: int
    share_layers: bool = False
    """The encoder runs the decoder's layers without their cross attention, and has none of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_encoder_layers < 1:
            raise ValueError(f"num_encoder_layers = {self.num_encoder_layers}: must be at least 1")
        if self.share_layers and self.num_encoder_layers != self.num_hidden_layers:
            raise ValueError(
                f"num_encoder_layers = {self.num_encoder_layers}: with share_layers it must be num_hidden_layers ="
                f" {self.num_hidden_layers}"
            )

    @property
    def source_pad_token_id(self) -> int:
        """The id that pads sources."""
        return self.pad_token_id

    def parameter_count(self) -> int:
        """Number of parameters of the exported model, with tied and shared weights counted once."""
        return self._parameters(0 if self.share_layers else self.num_encoder_layers)

    def _parameters(self, encoder_layers: int) -> int:
        width, feed_forward = self.hidden_size, self.intermediate_size
        layer = 4 * width * (width + 1) + 2 * width * feed_forward + feed_forward + width + 4 * width
        cross_attention = 4 * width * (width + 1) + 2 * width
        layers = (encoder_layers + self.num_hidden_layers) * layer + self.num_hidden_layers * cross_attention
        ends = (self.max_position_embeddings + 2) * width  # of each: its positions and its last layer norm
        return self.vocab_size * width + layers + 2 * ends

    def flops_per_token(self, context_length: int) -> float:
        """As `DecoderConfig.flops_per_token`, the mean of a source token and a target token.

        A source token passes the encoder, a target token the decoder, so each multiplies about half of the weights.
        """
        attentions = self.num_encoder_layers + 2 * self.num_hidden_layers
        return 3 * self._parameters(self.num_encoder_layers) + 6 * attentions * self.hidden_size * context_length


@dataclass(frozen=True, kw_only=True)
class BertGenerationConfig(DecoderConfig):
    """The shape of an encoder like BERT's. Names and defaults are those of transformers' `BertGenerationConfig`."""

    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def parameter_count(self) -> int:
        """Number of parameters. There is no norm after the last layer, but one after the embeddings."""
        return super().parameter_count() - 2 * self.hidden_size  # no two rows in front of the positions


@dataclass(frozen=True, kw_only=True)
class BertEncoderDecoderConfig(EncoderDecoderConfig):
    """The shape of an encoder like BERT's and a decoder of BioGPT's layers. Other values hold for both."""

    encoder: dict[str, Any]
    """What a folder of transformers decides of the encoder: values of `BertGenerationConfig`, by their names."""

    @property
    def source_pad_token_id(self) -> int:
        """As `EncoderDecoderConfig.source_pad_token_id`."""
        return self.encoder["pad_token_id"]

    def encoder_config(self) -> BertGenerationConfig:
        """The shape of the encoder."""
        for_both = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop")
        for_both += ("layerdrop_seed", "gradient_checkpointing")
        return BertGenerationConfig(**self.encoder, **{name: getattr(self, name) for name in for_both})

    def parameter_count(self) -> int:
        """As `EncoderDecoderConfig.parameter_count`, with the map between sides of different widths."""
        own_encoder = (self.max_position_embeddings + 2) * self.hidden_size  # of no layers
        encoder = self.encoder_config()
        differ = encoder.hidden_size != self.hidden_size
        between = differ * (encoder.hidden_size + 1) * self.hidden_size
        return self._parameters(0) - own_encoder + encoder.parameter_count() + between

    def flops_per_token(self, context_length: int) -> float:
        """As `EncoderDecoderConfig.flops_per_token`. The encoder's embedding is looked up and multiplies nothing."""
        encoder = self.encoder_config()
        multiplied = self.parameter_count() - encoder.vocab_size * encoder.hidden_size
        widths = encoder.num_hidden_layers * encoder.hidden_size + 2 * self.num_hidden_layers * self.hidden_size
        return 3 * multiplied + 6 * widths * context_length


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
"""Shapes by name. The vocabulary size comes from the shards."""
