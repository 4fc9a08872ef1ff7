"""The encoder against transformers' BertGenerationEncoder and BertModel with random weights of these classes.

No published weights are at hand.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, EncoderDecoderConfig, EncoderDecoderModel
from transformers import BertGenerationConfig as HfConfig
from transformers import BertGenerationEncoder as HfEncoder

from model.bert_generation import BertEncoderDecoder, BertGenerationEncoder, from_hf, hf_config, to_hf
from model.config import BertEncoderDecoderConfig, BertGenerationConfig
from model.decoder import is_dropped
from tests.model.shapes import SHAPE, small_config, small_decoder


def shaken(model: Any) -> Any:
    """A model whose every weight is random, biases and norms too, so that no mistake hides behind a zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder_with(state: dict[str, Tensor], **changes: Any) -> BertGenerationEncoder:
    """Our encoder with the weights of a model of transformers."""
    encoder = BertGenerationEncoder(BertGenerationConfig(**{**SHAPE, **changes}))
    encoder.load_state_dict(from_hf(state))
    return encoder.eval()


def padded_sources(lengths: tuple[int, ...] = (23, 40, 1, 9), pad: int = 0) -> tuple[Tensor, Tensor]:
    """Sources of these lengths, padded on the right, and a mask of their tokens."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(5, 101, real.shape).where(real, pad), real


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_hidden_states_are_those_of_transformers_with_padding(eps: float) -> None:
    theirs = shaken(HfEncoder(HfConfig(**SHAPE, layer_norm_eps=eps)))
    ours, (ids, real) = encoder_with(theirs.state_dict(), layer_norm_eps=eps), padded_sources()
    found, expected = ours(ids, real), theirs(ids, attention_mask=real.long()).last_hidden_state
    assert torch.allclose(found[real], expected[real], atol=1e-5, rtol=0)
    assert not torch.allclose(found[real], theirs(ids).last_hidden_state[real], atol=1e-2)  # the mask matters


def test_gradients_are_those_of_transformers() -> None:
    theirs = shaken(HfEncoder(HfConfig(**SHAPE)))
    ours, (ids, real) = encoder_with(theirs.state_dict()).train(), padded_sources()
    weights = torch.randn(60)
    (ours(ids, real)[real] @ weights).sum().backward()
    (theirs(ids, attention_mask=real.long()).last_hidden_state[real] @ weights).sum().backward()
    wanted = from_hf({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and torch.allclose(parameter.grad, wanted[name], atol=1e-3, rtol=1e-4), name


def test_bert_under_token_types_0_is_folded_exactly() -> None:
    """With and without a head; BERT's other token types and its pooler are left out."""
    theirs = shaken(BertModel(BertConfig(**SHAPE)))
    ids, real = padded_sources()
    expected = theirs(ids, attention_mask=real.long(), token_type_ids=torch.zeros_like(ids)).last_hidden_state
    ours = encoder_with(theirs.state_dict())
    assert torch.allclose(ours(ids, real)[real], expected[real], atol=1e-5, rtol=0)
    other = theirs(ids, attention_mask=real.long(), token_type_ids=torch.ones_like(ids)).last_hidden_state
    assert not torch.allclose(ours(ids, real)[real], other[real], atol=1e-2)
    masked = shaken(BertForMaskedLM(BertConfig(**SHAPE)))
    assert any(name.startswith("bert.") for name in masked.state_dict())
    expected = masked.bert(ids, attention_mask=real.long()).last_hidden_state
    assert torch.allclose(encoder_with(masked.state_dict())(ids, real)[real], expected[real], atol=1e-5, rtol=0)


def test_checkpoints_of_the_first_years_have_other_names_of_norms() -> None:
    state = shaken(BertModel(BertConfig(**SHAPE))).state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    } | {"embeddings.position_ids": torch.arange(40)[None]}
    assert any(name.endswith("gamma") for name in old)
    for one, other in zip(from_hf(old).values(), from_hf(state).values(), strict=True):
        assert torch.equal(one, other)


def test_weights_go_there_and_back_and_their_names_are_transformers_own() -> None:
    state = shaken(HfEncoder(HfConfig(**SHAPE))).state_dict()
    again = to_hf(from_hf(state))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert set(to_hf(from_hf(state), "encoder.")) == {f"encoder.{name}" for name in state}
    config = BertGenerationConfig(**SHAPE)
    assert config.parameter_count() == sum(tensor.numel() for tensor in state.values())
    assert HfEncoder(HfConfig(**hf_config(config))).state_dict().keys() == state.keys()


def test_missing_and_unknown_names_are_named() -> None:
    state = shaken(HfEncoder(HfConfig(**SHAPE))).state_dict()
    gone = "encoder.layer.1.attention.self.value.bias"
    with pytest.raises(ValueError, match=f"{gone}: missing"):
        from_hf({name: tensor for name, tensor in state.items() if name != gone})
    unknown = "encoder.layer.0.crossattention.self.query.weight"
    with pytest.raises(ValueError, match=f"{unknown}: not a weight of BERT's encoder"):
        from_hf(state | {unknown: torch.zeros(1)})


def test_layerdrop_skips_exactly_the_drawn_layers_and_none_in_evaluation() -> None:
    state = shaken(HfEncoder(HfConfig(**SHAPE))).state_dict()
    dropping, (ids, real) = encoder_with(state, layerdrop=0.5, layerdrop_seed=7), padded_sources()
    for step in range(4):
        plain = encoder_with(state).train()
        kept = [layer for layer in range(3) if not is_dropped(0.5, 7, step, 1, layer)]
        plain.layers = torch.nn.ModuleList(plain.layers[layer] for layer in kept)
        assert torch.equal(dropping.train()(ids, real, step, 1)[real], plain(ids, real)[real])
    assert torch.equal(dropping.eval()(ids, real, 3), encoder_with(state)(ids, real))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout: float) -> None:
    state = shaken(HfEncoder(HfConfig(**SHAPE))).state_dict()
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")
    ids, real = padded_sources()
    gradients = []
    for mode in ("none", "selective", "full"):
        encoder = encoder_with(state, gradient_checkpointing=mode, **dict.fromkeys(names, dropout)).train()
        torch.manual_seed(5)
        encoder(ids, real)[real].pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


# With the decoder


def bert_encoder_decoder(width: int = 48, **changes: Any) -> BertEncoderDecoder:
    """A model whose every weight is random. By default the encoder is less wide than the decoder."""
    encoder = {name: SHAPE[name] for name in SHAPE if "dropout" not in name}
    encoder |= {"hidden_size": width, "num_attention_heads": 4, "layer_norm_eps": 1e-12, "pad_token_id": 0}
    config = vars(small_config(num_hidden_layers=2, vocab_size=97, **changes))
    torch.manual_seed(4)
    return shaken(BertEncoderDecoder(BertEncoderDecoderConfig(**config, num_encoder_layers=3, encoder=encoder)))


def transformers_twin(model: BertEncoderDecoder) -> Any:
    """transformers' EncoderDecoderModel with the model's weights, in evaluation mode."""
    twin: Any = EncoderDecoderModel(EncoderDecoderConfig(**model.hf_config()))
    missing, unexpected = twin.load_state_dict(model.hf_weights(), strict=False)
    assert missing == ["decoder.lm_head.weight"] and not unexpected
    twin.tie_weights()
    return twin.eval()


def sources_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    """Sources, a mask of their tokens, and labels of several lengths."""
    ids, real = padded_sources((23, 9, 1))
    labels = torch.randint(4, 97, (3, 11))
    labels[1, 4:] = -100
    return ids, real, labels


@pytest.mark.parametrize("width", [60, 48])
def test_logits_loss_and_parameters_are_those_of_transformers(width: int) -> None:
    """With a map between sides of different widths, and without."""
    model = bert_encoder_decoder(width)
    twin, (ids, real, labels) = transformers_twin(model), sources_and_labels()
    expected = twin(input_ids=ids, attention_mask=real.long(), labels=labels)
    logits, counts = model.logits(ids, model.shifted_right(labels)), labels != -100
    assert torch.allclose(logits[counts], expected.logits[counts], atol=1e-5, rtol=0)
    assert model(ids, labels).item() == pytest.approx(expected.loss.item() * counts.sum().item(), rel=1e-5)
    assert model.config.parameter_count() == sum(parameter.numel() for parameter in twin.parameters())
    assert hasattr(twin, "enc_to_dec_proj") == (width != 60)
    other = ids.flip(0)  # the same lengths, but for their order
    assert not torch.allclose(model.logits(other, model.shifted_right(labels))[counts], logits[counts], atol=1e-2)


def test_transformers_generates_the_same_with_its_cache_as_without() -> None:
    twin, (ids, real, _) = transformers_twin(bert_encoder_decoder()), sources_and_labels()
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams}
        made = [twin.generate(ids, attention_mask=real.long(), use_cache=cache, **options) for cache in (True, False)]
        assert torch.equal(*made) and made[0].shape == (3, 13)


def test_the_decoder_starts_from_a_biogpt_and_the_rest_stays() -> None:
    model, biogpt = bert_encoder_decoder(), small_decoder(num_hidden_layers=2, vocab_size=97)
    given, own = biogpt.to_hf(dict(biogpt.state_dict())), model.state_dict()
    converted, unpadded = model.from_hf(given), biogpt.from_hf(given)
    assert converted.keys() == own.keys()
    for name, tensor in converted.items():
        drawn = name.startswith(("encoder.", "enc_to_dec_proj.")) or ".encoder_attn" in name
        kept = name.removeprefix("decoder.") if not drawn else ""
        wanted = own[name] if drawn else unpadded[kept][2 * ("embed_positions" in name) :]
        assert torch.equal(tensor, wanted), name


def losses_of_random_labels(model: Any, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean of the last losses after some training. The labels are random, so nothing can be learned of them."""
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    torch.manual_seed(6)
    for _ in range(60):
        loss = loss_of(torch.randint(5, 101, (16, 6)), torch.randint(57, 97, (16, 8)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_labels_as_the_decoders_inputs_are_copied_and_labels_alone_are_not() -> None:
    """transformers' documentation of BertGeneration passes both. Then the model sees what it is to predict."""
    chance = math.log(40)  # the labels are 40 different ids
    model = BertEncoderDecoder(bert_encoder_decoder().config)
    twin = transformers_twin(model).train()
    copied = losses_of_random_labels(twin, lambda ids, labels: twin(ids, decoder_input_ids=labels, labels=labels).loss)
    ours = losses_of_random_labels(model, lambda ids, labels: model(ids, labels) / labels.numel())
    print(f"chance {chance:.3f}, labels as inputs {copied:.3f}, ours {ours:.3f}")
    assert copied < 0.2 and ours > chance - 0.05


def test_a_row_of_padding_gives_finite_numbers() -> None:
    """The last rows of a batch of held-out examples hold none."""
    ids, labels = torch.zeros(2, 7, dtype=torch.long), torch.full((2, 5), -100)
    for dropout in (0.0, 0.1):
        model = bert_encoder_decoder(attention_probs_dropout_prob=dropout).train()
        loss = model(ids, labels)
        loss.backward()
        assert loss.item() == 0 and all(
            torch.as_tensor(parameter.grad).isfinite().all() for parameter in model.parameters()
        )


def test_fewer_positions_are_the_decoders_alone() -> None:
    model, (ids, _, labels) = bert_encoder_decoder(), sources_and_labels()
    shorter = model.with_positions(11)
    assert shorter.config.max_position_embeddings == 11 and shorter.encoder.embed_positions.num_embeddings == 40
    inputs = model.shifted_right(labels)
    assert torch.equal(shorter.logits(ids, inputs), model.logits(ids, inputs))
