"""A run in progress: what the loop and its observers share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.shards.blocks import TokenStream, TrainingBlocks
from model.config import DecoderConfig
from pretrain.recipe import Recipe


@dataclass(kw_only=True)
class Run:
    """State of one rank. `step`, `held_out`, `best`, `skipped` and `tokens` are the same on every rank."""

    recipe: Recipe
    folder: Path
    config: DecoderConfig
    data: dict[str, Any]
    """What the data order depends on: recorded in every checkpoint, compared at resume."""
    engine: Any
    """DeepSpeed's; see pretrain/engine.py."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    ranks: int
    train: TrainingBlocks
    validation: TokenStream
    resumed_from: str = ""
    """Name of the checkpoint that the run went on from."""
    recorded_probe: dict[str, Any] = field(default_factory=dict)
    """Loss of the first held-out blocks that the checkpoint recorded, and its precision; empty for other blocks."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    skipped_in_a_row: int = 0
    held_out: dict[str, Any] = field(default_factory=dict)
    """The last evaluation, with its step."""
    best: dict[str, Any] = field(default_factory=dict)
    """The evaluation with the lowest loss so far."""
    stop_reason: str = ""
    """Why the run ends before its last step; the same on every rank, for each stops after the same step."""

    @property
    def ending(self) -> bool:
        """Whether this was the last step of this process."""
        return self.step >= self.recipe.train.steps or bool(self.stop_reason)


class Observer:
    """Something that watches a run; the loop does not know what."""

    def begin(self, run: Run) -> None:
        """Before the first step."""

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """After each step; the report is that of `train.update`."""

    def close(self) -> None:
        """At the end, also after an error."""
