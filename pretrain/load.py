"""Open what was trained: a checkpoint of a run, or several whose weights are averaged, and the model."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data.common.files import UserError, read_json
from model.architecture import Architecture
from model.bert_generation import BertEncoderDecoder
from model.decoder import Decoder
from model.encoder_decoder import EncoderDecoder
from pretrain.checkpoint import (
    choose_checkpoint,
    last_checkpoints,
    newest_checkpoint,
    read_mean,
    read_model,
    read_state,
)
from pretrain.encoder_folder import with_encoder
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe


def load_run(run: Path, step: str = "", average: int = 1) -> tuple[Recipe, list[Path], dict[str, Any]]:
    """The recipe of a run, the checkpoints asked for (verified, the oldest first) and the state of the last of them.

    step: a number or "best"; "" means the newest whole checkpoint; average: the last so many instead. Raises UserError
    if the folder is not a run or does not have these checkpoints.
    """
    if step and average > 1:
        raise UserError("choose one of --step and --average")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    recipe = load_recipe(str(run / "recipe.toml"))
    if step:
        checkpoint = choose_checkpoint(run, step)
        return recipe, [checkpoint], read_state(checkpoint)
    if average > 1:
        checkpoints = last_checkpoints(run, average)
        return recipe, checkpoints, read_state(checkpoints[-1])
    checkpoint, faults = newest_checkpoint(run)
    for fault in faults:
        print(f"biogpt: warning: {fault}; using an older checkpoint", file=sys.stderr)
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet")
    return recipe, [checkpoint], read_state(checkpoint)


def load_model(checkpoints: list[Path], objective: Objective, device: torch.device) -> Architecture:
    """The model of a checkpoint, or with the mean of the weights of several, in fp32, for evaluation."""
    model = objective.build_model()
    fill_model(checkpoints, model)
    return model.to(device).eval()


def load_encoder_decoder(run: Path, recipe: Recipe, checkpoints: list[Path]) -> EncoderDecoder:
    """The encoder and decoder of a run's checkpoints, in fp32, as `load_run` chose them, without the run's data."""
    config = recipe.encoder_decoder_config(_vocabulary(run))
    if recipe.model.encoder:
        model = BertEncoderDecoder(with_encoder(config, run / "encoder"))
    else:
        model = EncoderDecoder(config)
    fill_model(checkpoints, model)
    return model


def load_decoder(run: Path, recipe: Recipe, checkpoints: list[Path]) -> Decoder:
    """The language model of a run's checkpoints, in fp32, as `load_run` chose them. The run's data are not needed.

    Raises UserError if its model has other weights too.
    """
    if recipe.has_encoder():
        raise UserError(f"{run}: its model is not a causal language model; it has an encoder")
    decoder = Decoder(recipe.decoder_config(_vocabulary(run)))
    with safe_open(checkpoints[-1] / "model.safetensors", "pt") as tensors:
        others = set(tensors.keys()) - decoder.to_hf(dict(decoder.state_dict())).keys()
    if others:
        raise UserError(f"{run}: its model is not a causal language model; it has the weights {', '.join(others)}")
    fill_model(checkpoints, decoder)
    return decoder


def _vocabulary(run: Path) -> int:
    return len(read_json(run / "tokenizer" / "vocab.json"))


def fill_model(checkpoints: list[Path], model: Architecture) -> None:
    """Fill a model with the weights of a checkpoint, or with the mean of several."""
    if len(checkpoints) == 1:
        read_model(checkpoints[0], model)
    else:
        read_mean(checkpoints, model)


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
