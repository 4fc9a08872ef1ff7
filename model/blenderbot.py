"""Weights between our encoder-decoder and transformers' Blenderbot, which is the same model; and from a BioGPT.

The names differ by a prefix. q, k and v are stacked in ours, and our embedding is padded. Blenderbot's positions begin
with the first row; BioGPT's tables have two rows in front of it, which nothing reads.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import VOCABULARY_MULTIPLE, EncoderDecoderConfig
from model.hf import EMBEDDING, PARTS, weights_from_hf

PREFIX = "model."
SHARED = "model.shared.weight"
TIED = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
"""Copies of the embedding, which transformers may store."""
BIAS = "final_logits_bias"  # a buffer of zeros
BIOGPT_POSITION_ROWS = 2
POSITIONS = "embed_positions.weight"
STACKED = {"qkv_proj": PARTS, "kv_proj": PARTS[1:]}


def to_hf(state: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Rename our tensors as `save_pretrained` names them: the embedding unpadded, its tied copies left out."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == EMBEDDING:
            converted[SHARED] = tensor[:vocab_size]
            continue
        theirs = PREFIX + re.sub(r"(\.layers\.\d+)\.(qkv_proj|out_proj)\.", r"\1.self_attn.\2.", name)
        stack = name.split(".")[-2]
        if stack in STACKED:
            parts = STACKED[stack]
            for part, value in zip(parts, tensor.chunk(len(parts)), strict=True):
                converted[theirs.replace(stack, part)] = value.contiguous()
        else:
            converted[theirs] = tensor
    return converted


def copied_to_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the decoder's layers without cross attention, by the names that the encoder's have."""
    return {
        name.replace("decoder.layers.", "encoder.layers."): tensor
        for name, tensor in weights.items()
        if "decoder.layers." in name and ".encoder_attn" not in name
    }


def from_hf(state: dict[str, Tensor], own: dict[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """The weights of a Blenderbot, or of a BioGPT for both sides, by our names, the embedding padded with zeros.

    own: our state dict; from a BioGPT, the cross attention stays as it is there. Raises ValueError if a name is
    unknown, a weight is missing, tied weights differ, or layers differ that we share.
    """
    if SHARED not in state:
        causal = weights_from_hf(state)
        causal[POSITIONS] = causal[POSITIONS][BIOGPT_POSITION_ROWS:]
        converted = {name: tensor for name, tensor in own.items() if ".encoder_attn" in name}
        converted[EMBEDDING] = causal.pop(EMBEDDING)
        converted |= {f"{side}.{name}": tensor for name, tensor in causal.items() for side in ("encoder", "decoder")}
    else:
        converted = _from_blenderbot(state)
    shared, layers = copied_to_encoder(converted), "encoder.layers."
    if not config.share_layers:  # a run that shares its layers stores them once
        return converted if any(name.startswith(layers) for name in converted) else shared | converted
    for name in shared.keys() & converted.keys():
        if not torch.equal(shared[name], converted[name]):
            raise ValueError(f"{name}: is not the decoder's, with which model.share_layers would share it")
    return {name: tensor for name, tensor in converted.items() if not name.startswith(layers)}


def _from_blenderbot(state: dict[str, Tensor]) -> dict[str, Tensor]:
    embedding, converted = state[SHARED], {}
    for name, tensor in state.items():
        if (name in TIED and not torch.equal(tensor, embedding)) or (name == BIAS and tensor.any()):
            raise ValueError(f"{name}: is not {SHARED if name in TIED else 'zero'}, as it is in this model")
        if name in (*TIED, BIAS, SHARED):
            continue
        if not name.startswith(PREFIX):
            raise ValueError(f"{name}: not a weight of Blenderbot")
        ours, part = name.removeprefix(PREFIX).replace(".self_attn.", "."), name.split(".")[-2]
        stack = "kv_proj" if ".encoder_attn." in name else "qkv_proj"
        if part not in STACKED[stack]:
            converted[ours] = tensor
        elif part == STACKED[stack][0]:
            parts = [name.replace(part, each) for each in STACKED[stack]]
            missing = [each for each in parts if each not in state]
            if missing:
                raise ValueError(f"{missing[0]}: missing")
            converted[ours.replace(part, stack)] = torch.cat([state[each] for each in parts])
    return converted | {EMBEDDING: F.pad(embedding, (0, 0, 0, -len(embedding) % VOCABULARY_MULTIPLE))}


def hf_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The content of `config.json` for transformers' BlenderbotConfig."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("attention_heads", config.num_attention_heads),
            ("ffn_dim", config.intermediate_size),
            ("layerdrop", config.layerdrop),
        )
    }
    return {
        "architectures": ["BlenderbotForConditionalGeneration"],
        "model_type": "blenderbot",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_hidden_layers,
        **sides,
        "max_position_embeddings": config.max_position_embeddings,
        "activation_function": "gelu",
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "activation_dropout": config.activation_dropout,
        "init_std": 0.02,
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.eos_token_id,
        "forced_eos_token_id": None,  # Blenderbot's own default ends every text at the limit, and the next repeats none
        "encoder_no_repeat_ngram_size": 0,
        "dtype": "float32",
    }
