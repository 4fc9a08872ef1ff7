"""A folder of transformers with a BERT or a BertGenerationEncoder: its shape, its tokenizer and its weights."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.common.files import UserError, read_json
from model.bert_generation import BertGenerationEncoder, from_hf
from model.config import BertEncoderDecoderConfig, BertGenerationConfig, EncoderDecoderConfig
from pretrain.given import ENCODER_TOKENIZER, SHAPE, encoder_files
from pretrain.hf_folder import load_tokenizer
from pretrain.weights import fill, read_weights

FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
"""The values that our encoder has, of keys of `config.json`. They are the defaults there."""


def tokenizer_files(folder: Path) -> list[str]:
    """The files of the folder's tokenizer."""
    return [name for name in encoder_files(folder) if name in ENCODER_TOKENIZER]


def read_shape(folder: Path) -> dict[str, Any]:
    """What the folder decides of `BertGenerationConfig`: its values by name. Raises UserError that names a mistake."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model.encoder = {folder}: no such folder; expected a BERT's, with config.json and weights")
    config = read_json(path)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("bert", "bert-generation"):
        raise UserError(f"{path}: model_type = {kind!r}; an encoder must be 'bert' or 'bert-generation'")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key} = {config[key]!r}; the encoder here has {value!r}")
    missing = [key for key in SHAPE if not isinstance(config.get(key), int)]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}; an encoder needs it")
    rest = {"layer_norm_eps": config.get("layer_norm_eps", 1e-12), "pad_token_id": config.get("pad_token_id", 0)}
    shape = {key: config[key] for key in SHAPE} | rest
    try:
        BertGenerationConfig(**shape)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return shape


def with_encoder(config: EncoderDecoderConfig, folder: Path) -> BertEncoderDecoderConfig:
    """The shape of this decoder with the folder's encoder. Raises UserError as `read_shape` does."""
    shape = read_shape(folder)
    own = {"num_encoder_layers": shape["num_hidden_layers"], "encoder": shape}
    return BertEncoderDecoderConfig(**{**asdict(config), **own})


def encode_sources(folder: Path, texts: Sequence[str], vocab_size: int) -> list[np.ndarray]:
    """The ids of each text by the folder's tokenizer, int64, without special tokens: "[SEP]" in a text is text.

    Raises UserError if the tokenizer cannot be read or does not fit the encoder's vocabulary.
    """
    files = tokenizer_files(folder)
    if "spiece.model" in files and "tokenizer.json" not in files and find_spec("sentencepiece") is None:
        raise UserError(f"{folder}: its tokenizer is a SentencePiece model; `pip install sentencepiece` reads it")
    tokenizer = load_tokenizer(folder)
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    largest = max((max(ids, default=0) for ids in found), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{folder}: its tokenizer makes the id {largest}, its config.json has a vocab_size of {vocab_size}"
        )
    return [np.array(ids, np.int64) for ids in found]


def load_encoder(encoder: BertGenerationEncoder, folder: Path) -> None:
    """Load the folder's weights. Raises UserError that names what is missing or does not fit."""
    try:
        given = read_weights(folder)
        converted = from_hf(given)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    fill(encoder, folder, given, converted, "its config.json says another shape")
