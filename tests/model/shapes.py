"""Small decoders for tests, and transformers' model with the same weights."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BioGptConfig, BioGptForCausalLM

from model.config import DecoderConfig
from model.decoder import Decoder
from model.hf import hf_config, to_hf

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 77,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""Odd head count, an ffn that is no multiple of the width, no dropout."""


def small_config(**changes: Any) -> DecoderConfig:
    """A decoder of `SHAPE`, with changes."""
    return DecoderConfig(**(SHAPE | changes))


def small_decoder(**changes: Any) -> Decoder:
    """A decoder whose every weight is random, biases and norms too, so that no mistake hides behind a zero."""
    torch.manual_seed(1)
    decoder = Decoder(small_config(**changes))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder


def random_shape(seed: int) -> dict[str, int]:
    """Drawn at random: odd head counts and sizes, an ffn of any width, vocabularies around a multiple of 128."""
    draw = random.Random(seed)
    heads = draw.randint(1, 9)
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * draw.randint(2, 16),
        "intermediate_size": draw.randint(5, 200),
        "num_hidden_layers": draw.randint(1, 4),
        "max_position_embeddings": draw.randint(12, 90),
        "vocab_size": draw.choice([17, 127, 128, 129, 300]),
    }


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Each storage that autograd keeps of what runs inside: its address -> its bytes."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def transformers_twin(decoder: Decoder) -> BioGptForCausalLM:
    """transformers' BioGptForCausalLM with the decoder's weights, in evaluation mode."""
    twin = BioGptForCausalLM(BioGptConfig(**hf_config(decoder.config)))
    missing, unexpected = twin.load_state_dict(to_hf(decoder.state_dict(), decoder.config.vocab_size), strict=False)
    assert missing == ["output_projection.weight"] and not unexpected
    twin.tie_weights()
    return twin.eval()
