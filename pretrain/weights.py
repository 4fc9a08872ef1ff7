"""The weights that a new run starts from: an HF folder, a run, or a file of safetensors, torch or fairseq."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.common.files import MANIFEST, UserError, read_json, read_manifest, sha256, verify_files
from model.architecture import Architecture
from model.blenderbot import SHARED
from model.hf import CLASSIFIERS, EMBEDDING
from pretrain.given import biogpt_keys, given_model
from pretrain.tensor_file import all_finite

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""The names of the weights in a folder of transformers. The first that exists is used."""


def load_weights(model: Architecture, path: Path, tokenizer: Path) -> None:
    """Load all weights of the model from `path`. A head or cross attention that is not there stays as it was drawn.

    tokenizer: folder of the run's tokenizer. A tokenizer that comes with the weights must be the same. Raises UserError
    that names what does not fit.
    """
    if (path / "recipe.toml").is_file():
        given = given_model(path)
        check_tokenizer(given.tokenizer, tokenizer)
        path = given.weights
        verify_files(path.parent, read_manifest(path.parent, "checkpoint"))
    if path.is_dir():
        check_tokenizer(path, tokenizer)
        check_config(path, model.hf_config())
    try:
        given = read_weights(path)
        rows = {name: len(tensor) for name, tensor in given.items() if name.endswith((EMBEDDING, SHARED))}
        converted = model.from_hf(given)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    wrong = [(name, count) for name, count in rows.items() if count != model.config.vocab_size]
    if wrong:
        raise UserError(
            f"{path}: {wrong[0][0]} has {wrong[0][1]} rows, but the shards' vocabulary has {model.config.vocab_size}"
        )
    heads = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(CLASSIFIERS)}
    fill(model, path, given, heads | converted, "choose the model.preset and shape of these weights")


def fill(model: nn.Module, path: Path, given: dict[str, Tensor], converted: dict[str, Tensor], hint: str) -> None:
    """Fill a model with the weights `given` in `path`, which are `converted` to its names.

    Raises UserError that names a weight that is not finite; or that is missing, unknown or of another shape, with a
    hint.
    """
    for name, tensor in given.items():
        if not all_finite(tensor):
            raise UserError(f"{path}: {name} holds numbers that are not finite; these weights cannot be trained on")
    wanted = model.state_dict()
    for name in [*wanted, *converted]:
        if name not in converted or name not in wanted:
            what = "is missing" if name in wanted else "is not part of the model"
            raise UserError(f"{path}: {name} {what}; {hint}")
        found, expected = tuple(converted[name].shape), tuple(wanted[name].shape)
        if found != expected:
            raise UserError(f"{path}: {name} is of shape {found}, this model's of {expected}; {hint}")
    model.load_state_dict(converted)


def check_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Raise UserError if the folder has a manifest or a tokenizer that does not fit."""
    if (folder / MANIFEST).is_file():
        verify_files(folder, read_manifest(folder, "hf"))
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).is_file() and sha256(folder / name) != sha256(tokenizer / name):
            raise UserError(f"{folder}: made with another tokenizer than {tokenizer} ({name} differs)")


def check_config(folder: Path, ours: dict[str, Any]) -> None:
    """Raise UserError if the folder's config.json differs from ours in what the weights' shapes do not show."""
    path = folder / "config.json"
    given = biogpt_keys(read_json(path)) if path.is_file() else {}
    ours = biogpt_keys(ours)
    same_head = "id2label" in ours and given.get("architectures") == ours["architectures"]
    keys = ("num_attention_heads", "encoder_attention_heads", "hidden_act", "scale_embedding")
    for key in (*keys, *(["id2label"] if same_head else [])):
        if key in given and given[key] != ours.get(key):
            raise UserError(
                f"{path}: {key} = {given[key]}, this model's is {ours.get(key)}; choose that of these weights"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder or file, by the names they have there. Raises UserError if they cannot be read."""
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path}: has no weights ({' or '.join(WEIGHT_FILES)})")
        if found.suffix != ".json":
            return read_weights(found)
        parts = sorted(set(read_json(found)["weight_map"].values()))
        return {name: tensor for part in parts for name, tensor in read_weights(path / part).items()}
    if not path.is_file():
        raise UserError(f"model.weights = {path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # fairseq stores its settings with the weights
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: torch reads no weights from it ({str(error).splitlines()[0]})") from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds no state dict")
    return state
