"""The DeepSpeed configuration of a recipe. DeepSpeed itself is not imported, so `biogpt` can check it quickly."""

import json
from pathlib import Path
from typing import Any

from data.common.files import UserError, read_json
from pretrain import ROOT
from pretrain.recipe import Recipe

DROPPED = {
    "optimizer": "the recipe decides it",
    "scheduler": "the recipe decides it",
    "activation_checkpointing": "it would do nothing; use the recipe's model.gradient_checkpointing",
}
"""Sections that a DeepSpeed file may not have, and why."""


def deepspeed_config(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """The DeepSpeed JSON of the recipe with every "auto" filled in.

    Raises UserError that names every section that is not allowed and every value that contradicts the recipe.
    """
    own = recipe.deepspeed.config
    path = Path(own) if own else ROOT / "launch" / "deepspeed" / f"zero{recipe.deepspeed.stage}.json"
    config = read_json(path)
    mistakes = [f"remove `{section}`: {reason}" for section, reason in DROPPED.items() if section in config]
    for key, value in _decided(recipe, ranks, config).items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        if section.setdefault(name, "auto") not in ("auto", value):
            mistakes.append(f'{key} = {json.dumps(section[name])}, but the recipe says {value}; write "auto"')
        section[name] = value
    if mistakes:
        raise UserError(f"{path}: {'; '.join(mistakes)}")
    return config


def _decided(recipe: Recipe, ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    """The values that the recipe decides, by dotted key."""
    decided: dict[str, Any] = {
        "train_batch_size": recipe.global_batch_size(),
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps(ranks),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16.enabled": recipe.train.precision == "bf16",
        "fp16.enabled": recipe.train.precision == "fp16",
        "zero_optimization.stage": recipe.deepspeed.stage,
        "zero_allow_untested_optimizer": True,  # our own tests decide which kinds work
    }
    offloaded = {
        "offload_optimizer": recipe.deepspeed.offload_optimizer,
        "offload_param": recipe.deepspeed.offload_parameters,
    }
    for key, wanted in offloaded.items():
        if wanted or key in config.get("zero_optimization", {}):
            decided[f"zero_optimization.{key}.device"] = "cpu" if wanted else "none"
    return decided
