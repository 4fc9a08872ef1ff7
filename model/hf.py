"""Weights between our state dict and transformers' BioGPT, in both directions, and from fairseq's names.

The names differ by a prefix. Our `qkv_proj` is q, k and v stacked, and our embedding is padded. The same maps serve any
tensors with the names and shapes of the weights, such as an optimizer's moments.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import VOCABULARY_MULTIPLE, DecoderConfig

PREFIX = "biogpt."
FAIRSEQ_PREFIX = "decoder."
FAIRSEQ_VERSION = "decoder.version"  # a number that fairseq stores with the weights
EMBEDDING = "embed_tokens.weight"
HEAD = "output_projection.weight"  # tied to the embedding, so transformers does not store it in safetensors
CLASSIFIERS = ("classifier.", "score.")
"""The heads of heads.py, which have no prefix in transformers either."""
PARTS = ("q_proj", "k_proj", "v_proj")


def to_hf(state: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Rename our tensors as `save_pretrained` names them: the embedding unpadded, the tied head left out."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == EMBEDDING:
            tensor = tensor[:vocab_size]
        if not name.startswith(CLASSIFIERS):
            name = PREFIX + re.sub(r"\.(qkv_proj|out_proj)\.", r".self_attn.\1.", name)
        if ".qkv_proj." in name:
            for part, value in zip(PARTS, tensor.chunk(3), strict=True):
                converted[name.replace("qkv_proj", part)] = value.contiguous()
        else:
            converted[name] = tensor
    return converted


def weights_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers model (with a head or bare) or of fairseq, by our names.

    Raises ValueError if a name is unknown, a weight is missing, or the head is not the embedding.
    """
    prefixes = (PREFIX, FAIRSEQ_PREFIX)
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in state)), "")
    if prefix + EMBEDDING not in state:
        raise ValueError(f"{prefix}{EMBEDDING}: missing")
    heads = {name for name in state if name.removeprefix(prefix) == HEAD}
    for head in heads:
        if not torch.equal(state[head], state[prefix + EMBEDDING]):
            raise ValueError(f"{head}: is not {prefix}{EMBEDDING}, to which BioGPT's head is tied")
    rest = {name: tensor for name, tensor in state.items() if name not in heads and name != FAIRSEQ_VERSION}
    return from_hf(rest, prefix)


def from_hf(state: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Rename tensors back to our names, the embedding padded with zeros. Some parameters may be missing.

    Raises ValueError if a name is unknown, or only a part of q, k and v is there.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith((prefix, *CLASSIFIERS)):
            raise ValueError(f"{name}: not a weight of BioGPT")
        ours = name.removeprefix(prefix).replace(".self_attn.", ".")
        if ".q_proj." in name:
            parts = [name.replace("q_proj", part) for part in PARTS]
            missing = [part for part in parts if part not in state]
            if missing:
                raise ValueError(f"{missing[0]}: missing")
            converted[ours.replace("q_proj", "qkv_proj")] = torch.cat([state[part] for part in parts])
        elif ours == EMBEDDING:
            converted[ours] = F.pad(tensor, (0, 0, 0, -len(tensor) % VOCABULARY_MULTIPLE))
        elif ".k_proj." not in name and ".v_proj." not in name:
            converted[ours] = tensor
    return converted


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of `config.json` for transformers' BioGptConfig."""
    return {
        "architectures": ["BioGptForCausalLM"],
        "model_type": "biogpt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "activation_dropout": config.activation_dropout,
        "layerdrop": config.layerdrop,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": "float32",
        "boundaries": config.boundaries,  # our own key: transformers keeps it and does not read it
    }
