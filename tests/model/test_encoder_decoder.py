"""The encoder-decoder against transformers' Blenderbot and BioGPT, and its own promises."""

import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

from model.blenderbot import from_hf
from model.config import EncoderDecoderConfig
from model.decoder import is_dropped
from model.encoder_decoder import EncoderDecoder
from tests.model.shapes import random_shape, small_config, small_decoder, transformers_twin

SHARED = pytest.mark.parametrize("share", [False, True])


def small_encoder_decoder(share: bool = False, **changes: Any) -> EncoderDecoder:
    """A model whose every weight is random. Its encoder has one layer more, unless it shares the decoder's."""
    config = small_config(**changes)
    layers = config.num_hidden_layers if share else config.num_hidden_layers + 1
    own = {"num_encoder_layers": layers, "share_layers": share}
    torch.manual_seed(1)
    model = EncoderDecoder(EncoderDecoderConfig(**{**vars(config), **own}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def blenderbot_twin(model: EncoderDecoder) -> BlenderbotForConditionalGeneration:
    """transformers' Blenderbot with the model's weights, in evaluation mode."""
    twin = BlenderbotForConditionalGeneration(BlenderbotConfig(**model.hf_config()))
    missing, unexpected = twin.load_state_dict(model.hf_weights(), strict=False)
    tied = {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    assert set(missing) == {"final_logits_bias", "lm_head.weight", *tied} and not unexpected
    twin.tie_weights()
    return twin.eval()


def padded_batch(vocabulary: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and labels of several lengths, padded on the right."""
    source, labels = torch.randint(4, vocabulary, (3, length)), torch.randint(4, vocabulary, (3, length // 2))
    for row, (of_source, of_labels) in enumerate([(length, length // 2), (length // 2 + 1, 2), (1, length // 2 - 1)]):
        source[row, of_source:], labels[row, of_labels:] = 1, -100
    return source, labels


@SHARED
@pytest.mark.parametrize("seed", range(4))
def test_logits_loss_and_gradients_are_those_of_transformers(seed: int, share: bool) -> None:
    model = small_encoder_decoder(share, **random_shape(seed)).eval()
    config, twin = model.config, blenderbot_twin(model)
    source, labels = padded_batch(config.vocab_size, config.max_position_embeddings)
    expected = twin(source, attention_mask=(source != 1).long(), labels=labels)
    assert torch.allclose(model.logits(source, model.shifted_right(labels)), expected.logits, atol=1e-5, rtol=0)
    loss = model(source, labels)
    assert loss.item() == pytest.approx(expected.loss.item() * (labels != -100).sum().item(), rel=1e-5)
    loss.backward()
    (expected.loss * (labels != -100).sum()).backward()
    grads = {name: grad for name, p in twin.named_parameters() if (grad := p.grad) is not None}
    if share:  # the gradient of a shared weight is the sum of both uses
        for name in [name for name in grads if name.startswith("model.encoder.layers.")]:
            whole = grads[name] + grads[name.replace("encoder", "decoder", 1)]
            grads[name] = grads[name.replace("encoder", "decoder", 1)] = whole
    wanted = from_hf(grads, dict(model.state_dict()), config)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4), name


def test_without_cross_attention_the_decoder_is_biogpt_and_the_encoder_its_trunk_both_ways() -> None:
    biogpt = small_decoder().eval()
    twin, model = transformers_twin(biogpt), small_encoder_decoder(num_hidden_layers=3, share=False).eval()
    model = EncoderDecoder(EncoderDecoderConfig(**{**vars(model.config), "num_encoder_layers": 3})).eval()
    model.load_state_dict(model.from_hf(biogpt.hf_weights()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".encoder_attn.out_proj" in name:
                parameter.zero_()
    source, ids = padded_batch(101, 20)[0], torch.randint(0, 101, (3, 13))
    assert torch.allclose(model.logits(source, ids), twin(ids).logits, atol=1e-6, rtol=0)
    real = source != 1
    two_ways = real[:, None, None, :].expand(-1, 1, 20, -1)
    trunk: Any = twin.biogpt
    expected = trunk(source, attention_mask=two_ways, position_ids=torch.arange(20).expand(3, -1)).last_hidden_state
    assert torch.allclose(model.encode(source, real)[real], expected[real], atol=1e-6, rtol=0)


@SHARED
def test_padding_on_the_right_changes_nothing(share: bool) -> None:
    model = small_encoder_decoder(share).eval()
    source, labels = torch.randint(4, 101, (2, 9)), torch.randint(4, 101, (2, 6))
    longer = (
        torch.cat([source, torch.ones(2, 7, dtype=torch.long)], 1),
        torch.nn.functional.pad(labels, (0, 5), value=-100),
    )
    assert model(*longer).item() == pytest.approx(model(source, labels).item(), rel=1e-6)
    empty = torch.ones(1, 16, dtype=torch.long), torch.full((1, 11), -100)
    both = (torch.cat(pair) for pair in zip(longer, empty, strict=True))
    model.train()
    loss = model(*both)
    loss.backward()
    assert loss.item() == pytest.approx(model(source, labels).item(), rel=1e-6)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@SHARED
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout: float, share: bool) -> None:
    probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")
    batch, gradients = padded_batch(101, 20), []
    for mode in ("none", "selective", "full"):
        changes = {**dict.fromkeys(probabilities, dropout), "layerdrop": 0.3, "gradient_checkpointing": mode}
        model = small_encoder_decoder(share, **changes)
        torch.manual_seed(5)
        loss = model(*batch, step=1)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert len(other) == len(gradients[0])
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


@pytest.mark.usefixtures("aot_eager")
@SHARED
def test_compiled_layers_give_the_same(share: bool) -> None:
    batch = padded_batch(101, 20)
    plain, compiled = small_encoder_decoder(share), small_encoder_decoder(share)
    compiled.compile_layers()
    losses = [model(*batch) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-6)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-5)


def test_layerdrop_skips_the_drawn_layers_of_both_sides_and_none_in_evaluation() -> None:
    model = small_encoder_decoder(layerdrop=0.5, layerdrop_seed=7)
    batch = padded_batch(101, 20)
    for step in range(4):
        shorter = small_encoder_decoder()
        kept = [layer for layer in range(3) if not is_dropped(0.5, 7, step, 1, layer)]
        shorter.decoder.layers = torch.nn.ModuleList(shorter.decoder.layers[layer] for layer in kept)
        kept = [layer for layer in range(4) if not is_dropped(0.5, 7, step, 1, 3 + layer)]
        shorter.encoder.layers = torch.nn.ModuleList(shorter.encoder.layers[layer] for layer in kept)
        assert torch.equal(model(*batch, step=step, micro_step=1), shorter(*batch))
    assert torch.equal(model.eval()(*batch, step=3), small_encoder_decoder().eval()(*batch))


@SHARED
def test_parameters_are_counted_once(share: bool) -> None:
    model = small_encoder_decoder(share)
    tensors = model.to_hf(dict(model.state_dict())).values()
    assert model.config.parameter_count() == sum(tensor.numel() for tensor in tensors)


def test_operations_of_a_source_and_its_target_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by torch, for a source and a target of the same length, forward and backward."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
    }
    model = small_encoder_decoder(vocab_size=4096, **shape)
    ids = torch.randint(4, 101, (2, 64))
    monkeypatch.setattr("model.attention.kernels", lambda _: [SDPBackend.MATH])  # torch counts no fused kernel of CPUs
    with FlopCounterMode(display=False) as counter:
        model.logits(ids, ids).sum().backward()
    counted = counter.get_total_flops() / (2 * 2 * 64)
    # Positions, biases and norms are among the parameters, and multiply nothing.
    assert model.config.flops_per_token(64) == pytest.approx(counted, rel=0.05)


# What a model can learn


def draws(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of 5 of 8 tokens, and as targets the same tokens backwards."""
    source = torch.randint(4, 12, (rows, 5), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(source, (1, 0), value=2), source.flip(1)


def test_labels_alone_do_not_teach_to_copy() -> None:
    """Of labels that no source and no earlier label tells, nothing can be learned. `decoder_input_ids` that equal the
    labels, as in the recipe of BertGeneration's page, show the decoder what it is to predict."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
    ours, copying = small_encoder_decoder(**shape), small_encoder_decoder(**shape)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (ours, copying)]
    losses = [0.0, 0.0]
    for step in range(80):
        source, labels = draws(2 * step, 32)[0], draws(2 * step + 1, 32)[1]
        shown = torch.nn.functional.cross_entropy(copying.logits(source, labels).flatten(0, 1), labels.flatten())
        for index, loss in enumerate((ours(source, labels) / labels.numel(), shown)):
            optimizers[index].zero_grad()
            loss.backward()
            optimizers[index].step()
            losses[index] = loss.item()
    assert losses[0] > 0.95 * math.log(8)
    assert losses[1] < 0.1


def test_a_target_is_learned_from_its_source_and_lost_when_sources_are_shuffled() -> None:
    model = small_encoder_decoder(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        source, labels = draws(step, 64)
        optimizer.zero_grad()
        (model(source, labels) / labels.numel()).backward()
        optimizer.step()
    with torch.no_grad():
        source, labels = draws(10_000, 256)
        right, shuffled = (model(each, labels).item() / labels.numel() for each in (source, source.roll(1, 0)))
    print(f"nats a target: {right:.3f}, from shuffled sources {shuffled:.3f}")
    assert right < 0.5 and shuffled > math.log(8)
