"""The decoder against transformers' BioGPT, and its own promises: layerdrop, recomputation, initialisation."""

import itertools
import math
import shutil
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from data.text.ids import EOS_ID, PAD_ID
from model.decoder import Decoder, DecoderLayer, is_dropped
from model.hf import from_hf, to_hf
from tests.model.shapes import kept_for_backward, random_shape, small_config, small_decoder, transformers_twin


@pytest.mark.parametrize("seed", range(12))
def test_logits_and_gradients_are_those_of_transformers(seed: int) -> None:
    """Shapes drawn at random, a short and the full context, without and with padding on the right."""
    decoder = small_decoder(**random_shape(seed)).eval()
    twin = transformers_twin(decoder)
    for length in (7, decoder.config.max_position_embeddings):
        ids = torch.randint(0, decoder.config.vocab_size, (3, length))
        # Whole blocks, then texts of three lengths, padded on the right: ours needs no mask, transformers' gets one.
        for lengths in ((length,) * 3, (length, length // 2 + 1, 2)):
            real = torch.arange(length) < torch.tensor(lengths)[:, None]
            padded = ids.where(real, PAD_ID)
            logits, expected = decoder(padded), twin(padded, attention_mask=real.long()).logits
            assert logits.shape == expected.shape
            assert torch.allclose(logits[real], expected[real], atol=1e-5, rtol=0)

            decoder.zero_grad()
            twin.zero_grad()
            inputs, targets = padded[:, :-1], padded[:, 1:].where(real[:, 1:], -100)
            decoder(inputs, targets).backward()
            expected = twin(inputs, attention_mask=real[:, :-1].long()).logits
            F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
            wanted = from_hf({name: grad for name, p in twin.named_parameters() if (grad := p.grad) is not None})
            for name, parameter in decoder.named_parameters():
                assert parameter.grad is not None
                assert torch.allclose(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4), name


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    decoder = small_decoder().eval()
    ids = torch.randint(4, 101, (2, 20))
    padded = torch.cat([ids, torch.ones(2, 9, dtype=torch.long)], dim=1)
    expected = transformers_twin(decoder)(padded, attention_mask=(padded != 1).long()).logits[:, :20]
    assert torch.allclose(decoder(padded)[:, :20], decoder(ids), atol=1e-5, rtol=0)
    assert torch.allclose(decoder(padded)[:, :20], expected, atol=1e-5, rtol=0)


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


def test_layerdrops_draws_are_these_and_others_for_each_seed() -> None:
    """As literals: a run that another version began goes on with the same draws."""
    drawn = {
        seed: [[layer for layer in range(6) if is_dropped(0.5, seed, step, 1, layer)] for step in range(3)]
        for seed in (1, 2)
    }
    assert drawn == {
        1: [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 1, 2, 3, 5]],
        2: [[0, 3, 4], [0, 4, 5], [0, 1, 3, 4]],
    }


MODES = ("none", "selective", "full")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.usefixtures("aot_eager")
def test_recomputation_gives_the_same_bits(dropout: float, compiled: bool) -> None:
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")
    changes: dict[str, Any] = dict.fromkeys(probabilities, dropout)
    ids = torch.randint(4, 101, (2, 11))
    gradients = []
    for mode in MODES:
        decoder = small_decoder(gradient_checkpointing=mode, layerdrop=0.3, **changes)
        if compiled:
            decoder.compile_layers()
        torch.manual_seed(5)
        loss = decoder(ids[:, :-1], ids[:, 1:], step=1)
        loss.backward()
        # A layer that was dropped has no gradient.
        gradients.append([loss.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert len(other) == len(gradients[0])
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


class Operations(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kept_and_counted(decoder: Decoder) -> tuple[int, Counter[str]]:
    """Bytes of activations kept for the backward pass, and the operations that run in it."""
    ids = torch.randint(4, 101, (4, 40))
    with kept_for_backward() as kept:
        loss = decoder(ids[:, :-1], ids[:, 1:])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    with Operations() as operations:
        loss.backward()
    return sum(size for place, size in kept.items() if place not in parameters), operations.counts


def test_recomputation_keeps_less_and_selective_repeats_no_product() -> None:
    saved, counted = {}, {}
    for mode in MODES:
        decoder = small_decoder(gradient_checkpointing=mode, num_hidden_layers=6)
        saved[mode], counted[mode] = kept_and_counted(decoder)
    print(f"bytes kept for the backward pass: {saved}")
    assert saved["full"] < 0.5 * saved["selective"] and saved["selective"] < 0.8 * saved["none"]
    products = [name for name in counted["none"] if "mm" in name or "attention" in name]
    assert products and all(counted["selective"][name] == counted["none"][name] for name in products)
    assert counted["selective"]["native_layer_norm"] == 2 * 6 and counted["selective"]["gelu"] == 6
    assert counted["full"]["addmm"] > counted["selective"]["addmm"]


@pytest.mark.usefixtures("aot_eager")
def test_compiled_selective_recomputation_keeps_as_little_and_repeats_no_product() -> None:
    saved, counted = {}, {}
    for name, mode in (("eager", "selective"), ("none", "none"), ("selective", "selective")):
        decoder = small_decoder(gradient_checkpointing=mode, num_hidden_layers=6)
        if name != "eager":
            decoder.compile_layers()
        saved[name], counted[name] = kept_and_counted(decoder)
    assert saved["selective"] <= saved["eager"] < 0.8 * saved["none"]
    products = {name for counts in counted.values() for name in counts if "mm" in name or "attention" in name}
    assert products and all(counted["selective"][name] == counted["none"][name] for name in products)
    assert counted["selective"]["native_layer_norm"] == 2 * 6 and counted["selective"]["gelu"] == 6


def test_documents_of_a_block_are_as_if_each_ran_alone() -> None:
    """Logits and gradients, for blocks that begin inside a document and with one, by our decoder and transformers'."""
    decoder = small_decoder(boundaries="document")
    alone, twin = small_decoder(), transformers_twin(decoder)
    ids = torch.randint(4, 101, (3, 40))
    for row, column in [(0, 0), (0, 7), (0, 8), (1, 20), (1, 39), (2, 3)]:
        ids[row, column] = EOS_ID
    targets = torch.randint(4, 101, (3, 40))
    total = torch.zeros(())
    logits = decoder(ids)
    for row in range(3):
        cuts = [0, *(column for column in range(1, 40) if ids[row, column] == EOS_ID), 40]
        for start, stop in itertools.pairwise(cuts):
            piece = ids[row : row + 1, start:stop]
            assert torch.allclose(logits[row, start:stop], alone(piece)[0], atol=1e-5, rtol=0)
            assert torch.allclose(logits[row, start:stop], twin(piece).logits[0], atol=1e-5, rtol=0)
            total = total + alone(piece, targets[row : row + 1, start:stop])
    total.backward()
    loss = decoder(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for one, other in zip(decoder.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-5)
    assert not torch.allclose(alone(ids), logits, atol=1e-2)  # without boundaries it is another model


@pytest.mark.usefixtures("aot_eager")
def test_compiled_layers_give_the_same_and_are_compiled_once() -> None:
    """All layers share one graph, in every recompute mode."""
    ids = torch.randint(4, 101, (2, 21))
    for mode in MODES:
        for boundaries in ("none", "document"):
            torch._dynamo.reset()
            counters["stats"].clear()
            plain = small_decoder(gradient_checkpointing=mode, boundaries=boundaries)
            compiled = small_decoder(gradient_checkpointing=mode, boundaries=boundaries)
            compiled.compile_layers()
            losses = [decoder(ids[:, :-1], ids[:, 1:], step=1) for decoder in (plain, compiled)]
            for loss in losses:
                loss.backward()
            assert torch.allclose(*losses, rtol=1e-6)
            for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
                assert (
                    one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-5)
                )
            graphs = counters["stats"]["unique_graphs"]
            assert graphs == 2, f"{mode}, {boundaries}: a layer and the loss are two graphs, not {graphs}"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", MODES)
def test_inductor_gives_the_same(mode: str) -> None:
    ids = torch.randint(4, 101, (2, 21))
    plain, compiled = (small_decoder(gradient_checkpointing=mode) for _ in range(2))
    compiled.compile_layers()
    losses = [decoder(ids[:, :-1], ids[:, 1:]) for decoder in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-5)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-4)


def test_fairseq_initialisation_has_the_originals_statistics() -> None:
    """embeddings N(0, d^-0.5); q, k, v xavier_uniform of gain 1/sqrt(2); out_proj xavier; the rest as torch does."""
    torch.manual_seed(0)
    decoder = Decoder(small_config(hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=2000))
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    bound = math.sqrt(6 / (256 + 256))

    def spread(weight: torch.Tensor) -> float:
        return weight.std().item()

    assert spread(decoder.embed_tokens.weight[2:2000]) == pytest.approx(256**-0.5, rel=0.02)
    assert spread(decoder.embed_positions.weight[2:]) == pytest.approx(256**-0.5, rel=0.05)
    assert not decoder.embed_tokens.weight[1].any() and not decoder.embed_tokens.weight[2000:].any()
    assert not decoder.embed_positions.weight[1].any()
    for projection in layer.qkv_proj.weight.split(256):
        assert projection.abs().max().item() <= bound / math.sqrt(2)
        assert spread(projection) == pytest.approx(bound / math.sqrt(2) / math.sqrt(3), rel=0.02)
    assert spread(layer.out_proj.weight) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.out_proj.bias.any()
    defaults = [(layer.fc1.weight, 256), (layer.fc2.weight, 1024)]
    defaults += [(layer.qkv_proj.bias, 256), (layer.fc1.bias, 256), (layer.fc2.bias, 1024)]
    for drawn, inputs in defaults:
        assert drawn.abs().max().item() <= 1 / math.sqrt(inputs)
        assert spread(drawn) == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.02 if drawn.dim() == 2 else 0.1)
    for norm in (layer.self_attn_layer_norm, layer.final_layer_norm, decoder.layer_norm):
        assert torch.equal(norm.weight, torch.ones(256)) and not norm.bias.any()


def test_hf_initialisation_has_transformers_statistics() -> None:
    torch.manual_seed(0)
    decoder = Decoder(small_config(hidden_size=256, num_attention_heads=4, vocab_size=2000, initialization="hf"))
    twin = transformers_twin(Decoder(decoder.config))
    twin.init_weights()
    ours, theirs = to_hf(decoder.state_dict(), 2000), twin.state_dict()
    for name, tensor in ours.items():
        if tensor.dim() == 2:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
            assert tensor.mean().item() == pytest.approx(0.0, abs=1e-3), name
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert not ours["biogpt.embed_tokens.weight"][1].any() and not theirs["biogpt.embed_tokens.weight"][1].any()
    assert not decoder.embed_tokens.weight[2000:].any()
