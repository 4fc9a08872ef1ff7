"""An encoder like BERT's (post-LN, learned positions, erf GELU), and BioGPT's decoder with cross attention to it.

Same hidden states as transformers' `BertGenerationEncoder` (modeling_bert_generation.py), and as its `BertModel` with
`token_type_ids` of 0, for the same weights. BertGeneration (Rothe, Narayan and Severyn 2020) is BERT without token
types and without the pooler.

Letters in tensor names: B batch, S positions of the source, H hidden size, V vocabulary.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import blenderbot
from model.attention import Segments, attend, both_ways
from model.config import BertEncoderDecoderConfig, BertGenerationConfig
from model.decoder import DecoderLayer
from model.encoder_decoder import CrossLayer, EncoderDecoder

ENCODER, DECODER, BETWEEN = "encoder.", "decoder.", "enc_to_dec_proj."
"""How the names of the parts of transformers' EncoderDecoderModel begin."""

NAMES = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
"""Our names of modules -> transformers'. Those of a layer follow `layers.N.` here and `encoder.layer.N.` there."""
PARTS = [f"attention.self.{part}" for part in ("query", "key", "value")]
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")
"""How tensors of BERT's folders begin that the encoder has no use for: the pooler, heads, and numbers 0, 1, 2, ..."""


class BertLayer(DecoderLayer):
    """Attention and feed-forward, each with a residual around and its layer norm behind."""

    def __init__(self, config: BertGenerationConfig, index: int) -> None:
        super().__init__(config, index)
        for norm in (self.self_attn_layer_norm, self.final_layer_norm):
            norm.eps = config.layer_norm_eps

    def _self_attention(self, hidden_BTH: Tensor, segments: Segments) -> Tensor:
        heads = (*hidden_BTH.shape[:2], 3, self.config.num_attention_heads, -1)
        query_BTND, key_BTND, value_BTND = self.qkv_proj(hidden_BTH).view(heads).unbind(2)
        out_BTND = attend(query_BTND, key_BTND, value_BTND, segments, self._attention_dropout())
        return self.self_attn_layer_norm(hidden_BTH + self._dropout(self.out_proj(out_BTND.flatten(2))))

    def _feed_forward(self, hidden_BTH: Tensor) -> Tensor:
        inner = self._product(self.fc2, self._activate, self.fc1(hidden_BTH))
        return self.final_layer_norm(hidden_BTH + self._dropout(inner))


class BertGenerationEncoder(nn.Module):
    """Hidden states of a source, which a decoder attends to."""

    def __init__(self, config: BertGenerationConfig, first_index: int = 0) -> None:
        """first_index: the number of the first layer, by which LayerDrop draws."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config, first_index + index) for index in range(config.num_hidden_layers))

    def forward(self, source_ids_BS: Tensor, real_BS: Tensor, step: int = 0, micro_step: int = 0) -> Tensor:
        """Hidden states, (B, S, H). real_BS: True where a token is no padding; those at padding mean nothing.

        step, micro_step: as for `Architecture.forward`.
        """
        positions_S = torch.arange(source_ids_BS.shape[1], device=source_ids_BS.device)
        hidden_BSH = self.embed_layer_norm(self.embed_tokens(source_ids_BS) + self.embed_positions(positions_S))
        hidden_BSH = F.dropout(hidden_BSH, self.config.hidden_dropout_prob, self.training)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, both_ways(real_BS), step, micro_step)
        return hidden_BSH


class BertEncoderDecoder(EncoderDecoder):
    """An encoder like BERT's, with an embedding of its own, and a decoder of BioGPT's layers.

    Same logits as transformers' `EncoderDecoderModel` of a `BertGenerationEncoder` and a `BlenderbotForCausalLM`.
    """

    config: BertEncoderDecoderConfig
    encoder: BertGenerationEncoder
    position_tables = ("decoder.embed_positions.weight",)  # the encoder's are those of its folder

    def __init__(self, config: BertEncoderDecoderConfig) -> None:
        super().__init__(config)
        self.leaf_modules = (BertLayer, CrossLayer)
        width, own = self.encoder.config.hidden_size, config.hidden_size
        # Its name is transformers', which has it only if the widths differ.
        self.enc_to_dec_proj = nn.Identity() if width == own else nn.Linear(width, own)

    def new_encoder(self) -> BertGenerationEncoder:
        """As `EncoderDecoder.new_encoder`."""
        return BertGenerationEncoder(self.config.encoder_config(), self.config.num_hidden_layers)

    def encode(self, source_ids_BS: Tensor, real_BS: Tensor, step: int = 0, micro_step: int = 0) -> Tensor:
        """As `EncoderDecoder.encode`, as wide as the decoder."""
        return self.enc_to_dec_proj(self.encoder(source_ids_BS, real_BS, step, micro_step))

    def to_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.to_hf`."""
        encoder = {name.removeprefix(ENCODER): each for name, each in tensors.items() if name.startswith(ENCODER)}
        between = {name: each for name, each in tensors.items() if name.startswith(BETWEEN)}
        rest = {name: each for name, each in tensors.items() if not name.startswith((ENCODER, BETWEEN))}
        decoder = {
            DECODER + name.replace(blenderbot.SHARED, "model.decoder.embed_tokens.weight"): each
            for name, each in blenderbot.to_hf(rest, self.config.vocab_size).items()
        }
        return to_hf(encoder, ENCODER) | between | decoder

    def from_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.from_hf`, for the decoder alone: everything else stays as it is."""
        own = dict(self.state_dict())
        kept = {name: tensor for name, tensor in own.items() if name.startswith((ENCODER, BETWEEN))}
        given = blenderbot.from_hf(tensors, own, self.config)
        return {name: tensor for name, tensor in given.items() if not name.startswith(ENCODER)} | kept

    def hf_config(self) -> dict[str, Any]:
        """As `Architecture.hf_config`."""
        decoder = blenderbot.hf_config(self.config)
        ids = {key: decoder[key] for key in decoder if key.endswith("_token_id")}
        of_decoder = {"is_encoder_decoder": False, "is_decoder": True, "add_cross_attention": True}
        return {
            "architectures": ["EncoderDecoderModel"],
            "model_type": "encoder-decoder",
            "is_encoder_decoder": True,
            "encoder": hf_config(self.config.encoder_config()),
            "decoder": decoder | {"architectures": ["BlenderbotForCausalLM"]} | of_decoder,
            "vocab_size": self.config.vocab_size,
            **ids,
            "dtype": "float32",
        }


def to_hf(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename our tensors as transformers' BertGenerationEncoder names them, after a prefix."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, module, kind = _split(name, r"layers\.\d+\.")
        front = prefix + layer.replace("layers.", "encoder.layer.")
        if module == "qkv_proj":
            for part, value in zip(PARTS, tensor.chunk(3), strict=True):
                converted[f"{front}{part}.{kind}"] = value.contiguous()
        else:
            converted[f"{front}{NAMES[module]}.{kind}"] = tensor
    return converted


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' BertGenerationEncoder or BertModel, bare or with heads, by our names.

    Row 0 of BERT's token types is added to each position: every token is of type 0. Raises ValueError if a name is
    unknown or missing.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in state) else ""
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    used = {name: tensor for name, tensor in bare.items() if not name.startswith(UNUSED)}
    # Checkpoints of the first years name the weights of a layer norm as TensorFlow does.
    used = {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): tensor for name, tensor in used.items()}
    token_types = used.pop(TOKEN_TYPES, None)
    ours, converted = {theirs: name for name, theirs in NAMES.items()}, {}
    for name, tensor in used.items():
        layer, module, kind = _split(name, r"encoder\.layer\.\d+\.")
        front = layer.replace("encoder.layer.", "layers.")
        if module == PARTS[0]:
            parts = [f"{layer}{part}.{kind}" for part in PARTS]
            missing = [part for part in parts if part not in used]
            if missing:
                raise ValueError(f"{prefix}{missing[0]}: missing")
            converted[f"{front}qkv_proj.{kind}"] = torch.cat([used[part] for part in parts])
        elif module in ours:
            converted[f"{front}{ours[module]}.{kind}"] = tensor
        elif module not in PARTS:
            raise ValueError(f"{prefix}{name}: not a weight of BERT's encoder")
    if token_types is not None and "embed_positions.weight" in converted:
        converted["embed_positions.weight"] = converted["embed_positions.weight"] + token_types[0]
    return converted


def _split(name: str, layer: str) -> tuple[str, str, str]:
    """The layer with its point (or ""), the module and the last part of a parameter's name."""
    found = re.match(layer, name)
    front = found[0] if found else ""
    module, _, kind = name.removeprefix(front).rpartition(".")
    return front, module, kind


def hf_config(config: BertGenerationConfig) -> dict[str, Any]:
    """The content of `config.json` for transformers' BertGenerationConfig."""
    copied = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    copied += ("max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
    return {
        "architectures": ["BertGenerationEncoder"],
        "model_type": "bert-generation",
        "hidden_act": "gelu",
        **{key: getattr(config, key) for key in copied},
        "initializer_range": 0.02,
        "bos_token_id": None,  # nothing reads them
        "eos_token_id": None,
        "pad_token_id": config.pad_token_id,
        "dtype": "float32",
    }
