"""A model to start from, as a folder for transformers or a run: where its weights and its tokenizer are, and its shape.

Nothing here imports torch, because recipes are read without it. `weights.py` reads the weights.
"""

from pathlib import Path
from typing import Any, NamedTuple

from data.common.files import MANIFEST, UserError, read_json

SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""What the weights decide of a model's shape, by the names of recipes and of transformers."""


ENCODER_LAYERS = "num_encoder_layers"
"""A shape has it if the model is an encoder and a decoder."""
BLENDERBOT = {
    "d_model": "hidden_size",
    "decoder_layers": "num_hidden_layers",
    "encoder_layers": ENCODER_LAYERS,
    "decoder_attention_heads": "num_attention_heads",
    "decoder_ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
}
"""Keys of transformers' BlenderbotConfig -> what BioGptConfig calls the same."""


ENCODER_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The files that the tokenizer of a BERT may have."""


class Given(NamedTuple):
    """A model that exists already."""

    weights: Path
    """The HF folder, or the file of the run's newest checkpoint."""
    tokenizer: Path
    shape: dict[str, int]
    """The values of SHAPE, and that of ENCODER_LAYERS if it has an encoder."""


def given_model(path: Path) -> Given:
    """The model of an HF folder or of a run. Raises UserError that names what is missing."""
    if not path.is_dir():
        raise UserError(f"model.weights = {path}: no such folder; expected an exported folder or a run")
    if not (path / "recipe.toml").is_file():
        return Given(path, path, _shape(path / "config.json", biogpt_keys(read_json(path / "config.json"))))
    pointer, manifest = path / "latest", read_json(path / MANIFEST)
    if not pointer.is_file():
        raise UserError(f"model.weights = {path}: this run has no checkpoint yet")
    weights = path / "checkpoints" / pointer.read_text().strip() / "model.safetensors"
    return Given(weights, path / "tokenizer", _shape(path / MANIFEST, manifest.get("model")))


def _shape(path: Path, values: Any) -> dict[str, int]:
    missing = [key for key in SHAPE if not isinstance(values, dict) or not isinstance(values.get(key), int)]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}; a model to start from needs it")
    return {key: values[key] for key in (*SHAPE, ENCODER_LAYERS) if key in values}


def biogpt_keys(config: Any) -> Any:
    """The content of a `config.json` with the keys of BioGptConfig, also if it is a Blenderbot's, or holds one's."""
    if isinstance(config, dict) and config.get("model_type") == "encoder-decoder":
        config = config.get("decoder")
    if not isinstance(config, dict) or config.get("model_type") != "blenderbot":
        return config
    return {BLENDERBOT.get(key, key): value for key, value in config.items()}


def encoder_files(folder: Path) -> list[str]:
    """The configuration and the tokenizer's files of a folder with an encoder: what a run and an export hold of it."""
    return [name for name in ("config.json", *ENCODER_TOKENIZER) if (folder / name).is_file()]
