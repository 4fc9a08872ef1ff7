"""The decoder against transformers' BioGPT, and its own promises: layerdrop, recomputation, initialisation."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.decoder import Decoder, DecoderLayer, is_dropped
from tests.model.shapes import small_config, small_decoder, transformers_twin

SHAPES = [
    {},
    {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 128},
    {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 31, "num_hidden_layers": 1},
    {"hidden_size": 64, "num_attention_heads": 16, "max_position_embeddings": 130, "vocab_size": 1000},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("short", [False, True])
def test_logits_and_gradients_are_those_of_transformers(shape: dict[str, int], short: bool) -> None:
    decoder = small_decoder(**shape)
    twin, length = transformers_twin(decoder), 7 if short else decoder.config.max_position_embeddings
    ids = torch.randint(0, decoder.config.vocab_size, (3, length))

    logits, expected = decoder.eval()(ids), twin(ids).logits
    assert torch.allclose(logits, expected, atol=1e-5, rtol=0)

    decoder(ids[:, :-1], ids[:, 1:]).backward()
    F.cross_entropy(twin(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        if "qkv_proj" in name:
            twins = [f"biogpt.{name.replace('qkv_proj', f'self_attn.{part}_proj')}" for part in "qkv"]
        else:
            twins = [f"biogpt.{name.replace('out_proj', 'self_attn.out_proj')}"]
        wanted = torch.cat([gradients[twin_name] for twin_name in twins])  # type: ignore[misc]
        assert torch.allclose(parameter.grad, wanted, atol=1e-4, rtol=1e-4), name


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    decoder = small_decoder().eval()
    ids = torch.randint(4, 101, (2, 20))
    padded = torch.cat([ids, torch.ones(2, 9, dtype=torch.long)], dim=1)
    expected = transformers_twin(decoder)(padded, attention_mask=(padded != 1).long()).logits[:, :20]
    assert torch.allclose(decoder(padded)[:, :20], decoder(ids), atol=1e-5, rtol=0)
    assert torch.allclose(decoder(padded)[:, :20], expected, atol=1e-5, rtol=0)


def test_loss_is_the_sum_over_targets_that_count() -> None:
    decoder = small_decoder().eval()
    ids, targets = torch.randint(4, 101, (2, 10)), torch.randint(4, 101, (2, 10))
    targets[1, 3:] = -100
    log_probabilities = decoder(ids).log_softmax(-1)
    expected = sum(
        -log_probabilities[row, position, target].item()
        for row in range(2)
        for position, target in enumerate(targets[row].tolist())
        if target != -100
    )
    assert decoder(ids, targets).item() == pytest.approx(expected, rel=1e-5)


def test_layerdrop_skips_exactly_the_drawn_layers_and_none_in_evaluation() -> None:
    decoder = small_decoder(layerdrop=0.5, layerdrop_seed=7, num_hidden_layers=6)
    ids = torch.randint(4, 101, (2, 10))
    for step in range(5):
        for micro_step in range(2):
            shorter = small_decoder(num_hidden_layers=6)
            shorter.load_state_dict(decoder.state_dict())
            kept = [layer for layer in range(6) if not is_dropped(0.5, 7, step, micro_step, layer)]
            shorter.layers = torch.nn.ModuleList(shorter.layers[layer] for layer in kept)
            assert torch.equal(decoder.train()(ids, step=step, micro_step=micro_step), shorter.train()(ids))
    plain = small_decoder(num_hidden_layers=6)
    plain.load_state_dict(decoder.state_dict())
    assert torch.equal(decoder.eval()(ids, step=3), plain.eval()(ids))


def test_layerdrop_draws_at_its_rate_and_differently_for_each_step_micro_step_and_layer() -> None:
    draws = [[is_dropped(0.2, 1, step, micro, layer) for layer in range(24)] for step in range(200) for micro in (0, 1)]
    rate = sum(map(sum, draws)) / (24 * len(draws))
    assert abs(rate - 0.2) < 4 * math.sqrt(0.16 / (24 * len(draws)))  # four standard deviations
    assert len({tuple(row) for row in draws}) > 0.9 * len(draws)
    assert not any(is_dropped(0.0, 1, step, 0, 0) for step in range(100))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout: float) -> None:
    changes: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    ids = torch.randint(4, 101, (2, 11))
    gradients = []
    for recompute in (False, True):
        decoder = small_decoder(gradient_checkpointing=recompute, layerdrop=0.3, **changes)
        torch.manual_seed(5)
        loss = decoder(ids[:, :-1], ids[:, 1:], step=1)
        loss.backward()
        # A layer that was dropped has no gradient.
        gradients.append([loss.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_recomputation_keeps_less() -> None:
    """What autograd saves for the backward pass, in bytes."""
    ids, saved = torch.randint(4, 101, (4, 40)), []
    for recompute in (False, True):
        decoder, total = small_decoder(gradient_checkpointing=recompute, num_hidden_layers=6), [0]

        def count(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            decoder(ids[:, :-1], ids[:, 1:])
        saved.append(total[0])
    assert saved[1] < 0.5 * saved[0]


def test_fairseq_initialisation_has_the_originals_statistics() -> None:
    """embeddings N(0, d^-0.5); q, k, v xavier_uniform of gain 1/sqrt(2); out_proj xavier; fc the Linear default."""
    torch.manual_seed(0)
    decoder = Decoder(small_config(hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=2000))
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    bound = math.sqrt(6 / (256 + 256))

    def spread(weight: torch.Tensor) -> float:
        return weight.std().item()

    assert spread(decoder.embed_tokens.weight[2:]) == pytest.approx(256**-0.5, rel=0.02)
    assert spread(decoder.embed_positions.weight[2:]) == pytest.approx(256**-0.5, rel=0.05)
    assert not decoder.embed_tokens.weight[1].any()
    for projection in layer.qkv_proj.weight.split(256):
        assert projection.abs().max().item() <= bound / math.sqrt(2)
        assert spread(projection) == pytest.approx(bound / math.sqrt(2) / math.sqrt(3), rel=0.02)
    assert spread(layer.out_proj.weight) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.out_proj.bias.any()
    assert spread(layer.fc1.weight) == pytest.approx(1 / math.sqrt(256) / math.sqrt(3), rel=0.02)


def test_hf_initialisation_has_transformers_statistics() -> None:
    torch.manual_seed(0)
    decoder = Decoder(small_config(hidden_size=256, num_attention_heads=4, vocab_size=2000, initialization="hf"))
    twin = transformers_twin(Decoder(decoder.config))
    twin.init_weights()
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2 and "qkv" not in name:
            expected = dict(twin.named_parameters())["biogpt." + name.replace("out_proj", "self_attn.out_proj")]
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
