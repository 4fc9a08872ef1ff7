"""Shapes: the published parameter counts, and refusals."""

from typing import Any

import pytest

from model.config import PRESETS, DecoderConfig


@pytest.mark.parametrize(
    ("preset", "vocab_size", "parameters"), [("biogpt", 42_384, 346_763_264), ("biogpt-large", 57_717, 1_571_188_800)]
)
def test_presets_have_the_published_parameter_counts(preset: str, vocab_size: int, parameters: int) -> None:
    assert DecoderConfig(vocab_size=vocab_size, **PRESETS[preset]).parameter_count() == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "not divisible by num_attention_heads = 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"layerdrop": 1.0}, "layerdrop = 1.0"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing = True: choose from none, selective, full"),
        ({"boundaries": "sentence"}, "boundaries = 'sentence': choose from none, document"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob = -0.1"),
    ],
)
def test_a_bad_shape_is_named(change: dict[str, Any], message: str) -> None:
    shape: dict[str, Any] = PRESETS["tiny"] | {"vocab_size": 8} | change
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**shape)
