"""The encoder against transformers' BertGenerationEncoder and BertModel with random weights of these classes.

No published weights are at hand.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers import BertGenerationConfig as HfConfig
from transformers import BertGenerationEncoder as HfEncoder

from model.bert_generation import BertGenerationEncoder, from_hf, hf_config, to_hf
from model.config import BertGenerationConfig
from model.decoder import is_dropped

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
    found, expected = ours(ids), theirs(ids, attention_mask=real.long()).last_hidden_state
    assert torch.allclose(found[real], expected[real], atol=1e-5, rtol=0)
    assert not torch.allclose(found[real], theirs(ids).last_hidden_state[real], atol=1e-2)  # the mask matters


def test_gradients_are_those_of_transformers() -> None:
    theirs = shaken(HfEncoder(HfConfig(**SHAPE)))
    ours, (ids, real) = encoder_with(theirs.state_dict()).train(), padded_sources()
    weights = torch.randn(60)
    (ours(ids)[real] @ weights).sum().backward()
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
    assert torch.allclose(ours(ids)[real], expected[real], atol=1e-5, rtol=0)
    other = theirs(ids, attention_mask=real.long(), token_type_ids=torch.ones_like(ids)).last_hidden_state
    assert not torch.allclose(ours(ids)[real], other[real], atol=1e-2)
    masked = shaken(BertForMaskedLM(BertConfig(**SHAPE)))
    assert any(name.startswith("bert.") for name in masked.state_dict())
    expected = masked.bert(ids, attention_mask=real.long()).last_hidden_state
    assert torch.allclose(encoder_with(masked.state_dict())(ids)[real], expected[real], atol=1e-5, rtol=0)


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
        assert torch.equal(dropping.train()(ids, step=step, micro_step=1)[real], plain(ids)[real])
    assert torch.equal(dropping.eval()(ids, step=3), encoder_with(state)(ids))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout: float) -> None:
    state = shaken(HfEncoder(HfConfig(**SHAPE))).state_dict()
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")
    ids, real = padded_sources()
    gradients = []
    for mode in ("none", "selective", "full"):
        encoder = encoder_with(state, gradient_checkpointing=mode, **dict.fromkeys(names, dropout)).train()
        torch.manual_seed(5)
        encoder(ids)[real].pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


def test_a_row_of_padding_gives_finite_numbers() -> None:
    """The last rows of a batch of held-out examples hold none."""
    encoder = encoder_with(shaken(HfEncoder(HfConfig(**SHAPE))).state_dict(), attention_probs_dropout_prob=0.1)
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert encoder(ids).isfinite().all() and encoder.train()(ids).isfinite().all()
