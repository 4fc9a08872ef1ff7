"""Our state dict <-> transformers' BioGPT, both ways.

Names differ by the prefix `biogpt.` and the fused `qkv_proj`, which is q, k and v one above the other. The same maps
serve any tensors with the weights' names and shapes, such as Adam's moments.
"""

import re
from typing import Any

import torch
from torch import Tensor

from model.config import DecoderConfig
from model.decoder import PAD_ID

PREFIX = "biogpt."
HEAD = "output_projection.weight"  # tied to the embedding; transformers leaves it out of safetensors
PARTS = ("q_proj", "k_proj", "v_proj")


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> transformers' names. The tied head is left out, as `save_pretrained` does."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = PREFIX + re.sub(r"\.(qkv_proj|out_proj)\.", r".self_attn.\1.", name)
        if ".qkv_proj." in name:
            for part, value in zip(PARTS, tensor.chunk(3), strict=True):
                converted[name.replace("qkv_proj", part)] = value.contiguous()
        else:
            converted[name] = tensor
    return converted


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> our names. Raises ValueError where a name or part is missing or unknown."""
    state = {name: tensor for name, tensor in state.items() if name != HEAD}
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"{name}: not a weight of transformers' BioGPT")
        ours = name.removeprefix(PREFIX).replace(".self_attn.", ".")
        if ".q_proj." in name:
            parts = [name.replace("q_proj", part) for part in PARTS]
            missing = [part for part in parts if part not in state]
            if missing:
                raise ValueError(f"{missing[0]}: missing")
            converted[ours.replace("q_proj", "qkv_proj")] = torch.cat([state[part] for part in parts])
        elif ".k_proj." not in name and ".v_proj." not in name:
            converted[ours] = tensor
    return converted


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """`config.json` for transformers' BioGptConfig."""
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
        "bos_token_id": 0,
        "pad_token_id": PAD_ID,
        "eos_token_id": 2,
        "dtype": "float32",
    }
