"""Folders of BERT and of BertGenerationEncoder: shape, tokenizer, weights, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from data.common.files import UserError
from model.bert_generation import BertGenerationEncoder
from model.config import BertGenerationConfig
from pretrain.encoder_folder import encode_sources, load_encoder, read_shape
from tests.pretrain.berts import VOCABULARY, save_bert

TEXTS = ["Kalitinib causes asthma.", "[SEP] is text, and so is [PAD]", "?", ""]


@pytest.mark.parametrize("generation", [False, True])
def test_a_folder_gives_the_hidden_states_that_transformers_finds(generation: bool, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", generation, layer_norm_eps=1e-3)
    encoder = BertGenerationEncoder(BertGenerationConfig(**read_shape(folder))).eval()
    load_encoder(encoder, folder)
    ids = torch.randint(5, len(VOCABULARY), (2, 48))
    real = torch.arange(48) < torch.tensor([[48], [17]])
    ids = ids.where(real, 0)
    expected = AutoModel.from_pretrained(folder).eval()(ids, attention_mask=real.long()).last_hidden_state
    assert torch.allclose(encoder(ids, real)[real], expected[real], atol=1e-5, rtol=0)


def test_sources_have_the_ids_of_the_folders_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(folder), len(VOCABULARY)
    found = [ids.tolist() for ids in encode_sources(folder, TEXTS, vocabulary)]
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, split_special_tokens=True))
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"][1:-1]  # without [CLS] and [SEP]
    assert found[0][:3] == [VOCABULARY.index(word) for word in ("kalitinib", "causes", "asthma")]
    special = {VOCABULARY.index(piece) for piece in ("[PAD]", "[CLS]", "[SEP]")}
    assert all(special.isdisjoint(ids) for ids in found)


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def with_values(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def with_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state.pop(name, None)
        save_file(state if tensor is None else state | {name: tensor}, folder / "model.safetensors")

    return change


POSITIONS, VALUE = "embeddings.position_embeddings.weight", "encoder.layer.1.attention.self.value.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_values(model_type="roberta"), "model_type = 'roberta'; an encoder must be 'bert' or 'bert-generation'"),
        (with_values(hidden_act="relu"), "hidden_act = 'relu'; the encoder here has 'gelu'"),
        (with_values(position_embedding_type="relative_key"), "position_embedding_type = 'relative_key'"),
        (with_values(num_attention_heads=5), "hidden_size = 24: not divisible by num_attention_heads = 5"),
        (without("hidden_size"), "config.json: has no hidden_size; an encoder needs it"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "vocab.txt").unlink(), "tokenizer"),
        (with_values(vocab_size=40), "its config.json has a vocab_size of 40"),
        (with_values(num_hidden_layers=3), "layers.2.self_attn_layer_norm.weight is missing; its config.json says"),
        (with_values(max_position_embeddings=40), "is of shape (48, 24), this model's of (40, 24)"),
        (with_tensor(VALUE, None), f"{VALUE}: missing"),
        (with_tensor(POSITIONS, None), "embed_positions.weight is missing"),
        (with_tensor("decoder.weight", torch.zeros(1)), "decoder.weight: not a weight of BERT's encoder"),
        (with_tensor(POSITIONS, torch.full((48, 24), torch.nan)), f"{POSITIONS} holds numbers that are not finite"),
    ],
)
def test_what_is_amiss_is_one_line(change: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    change(folder)
    with pytest.raises(UserError) as caught:
        shape = read_shape(folder)
        encode_sources(folder, TEXTS, shape["vocab_size"])
        load_encoder(BertGenerationEncoder(BertGenerationConfig(**shape)), folder)
    assert said in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_sentencepiece_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_bert(tmp_path / "bert", generation=True)
    (folder / "vocab.txt").rename(folder / "spiece.model")
    monkeypatch.setattr("pretrain.encoder_folder.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is a SentencePiece model; `pip install sentencepiece` reads it"):
        encode_sources(folder, TEXTS, len(VOCABULARY))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.encoder = .*absent: no such folder; expected a BERT's"):
        read_shape(tmp_path / "absent")
