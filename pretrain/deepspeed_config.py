"""The DeepSpeed configuration of a recipe. DeepSpeed itself is not imported, so `biogpt` can check it quickly."""

import difflib
import json
from pathlib import Path
from typing import Any

from data.common.files import UserError, read_json
from pretrain import ROOT
from pretrain.deepspeed_keys import KNOWN, KNOWN_ZERO
from pretrain.recipe import Recipe

REFUSED = {
    "optimizer": "the recipe decides it",
    "scheduler": "the recipe decides it",
    "activation_checkpointing": "it would do nothing; use the recipe's model.gradient_checkpointing",
}
"""Sections that a DeepSpeed file may not have, and why."""


def deepspeed_config(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """The DeepSpeed JSON of the recipe with every "auto" filled in.

    A null means DeepSpeed's default, as if the key were not there. Raises UserError that names every key that is
    unknown or not allowed and every value that contradicts the recipe.
    """
    own = recipe.deepspeed.config
    path = Path(own) if own else ROOT / "launch" / "deepspeed" / f"zero{recipe.deepspeed.stage}.json"
    config = _without_nulls(read_json(path))
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; a DeepSpeed file is {{...}}")
    mistakes = [f"remove `{section}`: {reason}" for section, reason in REFUSED.items() if section in config]
    mistakes += _unknown("", config, (*KNOWN, *REFUSED))
    zero = config.get("zero_optimization", {})
    mistakes += _unknown("zero_optimization.", zero, KNOWN_ZERO) if isinstance(zero, dict) else []
    for key, value in _decided(recipe, ranks, zero).items():
        mistakes += _decide(config, key, value)
    if mistakes:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(mistakes))}")
    return config


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


def _unknown(prefix: str, section: dict[str, Any], known: tuple[str, ...]) -> list[str]:
    near = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0] for key in section if key not in known}
    return [f"unknown key {prefix}{key}; did you mean {prefix}{name}?" for key, name in near.items()]


def _decide(config: dict[str, Any], key: str, value: Any) -> list[str]:
    """Set a value that the recipe decides, by its dotted key. Returns what is wrong with the one that is there."""
    *sections, name = key.split(".")
    section = config
    for index, part in enumerate(sections):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            where = ".".join(sections[: index + 1])
            return [f"{where} = {json.dumps(section)}: must be a section, {{...}}"]
    if section.setdefault(name, "auto") not in ("auto", value):
        return [f'{key} = {json.dumps(section[name])}, but the recipe says {json.dumps(value)}; write "auto"']
    section[name] = value
    return []


def _decided(recipe: Recipe, ranks: int, zero: Any) -> dict[str, Any]:
    """The values that the recipe decides, by dotted key. zero: the file's section `zero_optimization`."""
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
        if wanted or (isinstance(zero, dict) and key in zero):
            decided[f"zero_optimization.{key}.device"] = "cpu" if wanted else "none"
    return decided
