"""Open what was trained: a run's newest checkpoint and its model."""

import sys
from pathlib import Path
from typing import Any

import torch

from data.common.files import UserError
from model.architecture import Architecture
from pretrain.checkpoint import choose_checkpoint, newest_checkpoint, read_model, read_state
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe


def load_run(run: Path, step: str = "") -> tuple[Recipe, Path, dict[str, Any]]:
    """The recipe of a run, a checkpoint (verified) and the checkpoint's state.

    step: a number or "best"; "" means the newest whole checkpoint. Raises UserError if the folder is not a run or has
    no such checkpoint.
    """
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    recipe = load_recipe(str(run / "recipe.toml"))
    if step:
        checkpoint = choose_checkpoint(run, step)
        return recipe, checkpoint, read_state(checkpoint)
    checkpoint, faults = newest_checkpoint(run)
    for fault in faults:
        print(f"biogpt: warning: {fault}; using an older checkpoint", file=sys.stderr)
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet")
    return recipe, checkpoint, read_state(checkpoint)


def load_model(checkpoint: Path, objective: Objective, device: torch.device) -> Architecture:
    """The model of a checkpoint, in fp32, for evaluation."""
    model = objective.build_model()
    read_model(checkpoint, model)
    return model.to(device).eval()


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
