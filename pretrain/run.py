"""A run in progress: the state that the loop and its observers share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.common.lease import Lease
from pretrain.objectives.objective import Objective
from pretrain.optimizer import Optimizer
from pretrain.recipe import Recipe
from pretrain.stopwatch import Stopwatch


@dataclass(kw_only=True)
class Run:
    """The state of one rank. `step`, `held_out`, `best`, `skipped` and `stop_reason` are the same on every rank."""

    recipe: Recipe
    objective: Objective
    folder: Path
    lease: Lease | None = None
    """The right to write the folder, checked before each checkpoint appears."""
    engine: Any
    """DeepSpeed's engine; see engine.py."""
    optimizer: Optimizer
    device: torch.device
    rank: int
    ranks: int
    resumed_from: str = ""
    """Name of the checkpoint that this run was resumed from."""
    recorded_probe: dict[str, Any] = field(default_factory=dict)
    """Loss of the first held-out examples as that checkpoint recorded it, and its precision. Empty for other data."""
    step: int = 0
    """Number of optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Number of steps skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    held_out: dict[str, Any] = field(default_factory=dict)
    """The last evaluation, with its step."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best evaluation so far (`held_out.rank`)."""
    stop_reason: str = ""
    """Why the run ends before its last step, or ""."""
    place: str = "the start"
    """Where this rank stands, in words. Set by `stamp`."""
    long_place: bool = True
    """Whether this place may take much longer than a step."""
    stamps: int = 0
    """Number of stamps so far. The watchdog sees by it whether this rank moves."""

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)

    @property
    def ending(self) -> bool:
        """Whether this was the last step of this process."""
        return self.step >= self.recipe.train.steps or bool(self.stop_reason)

    def stamp(self, place: str, long: bool = False) -> None:
        """Say where this rank stands now. long: it may stay there for much longer than a step takes."""
        self.place, self.long_place = place, long
        self.stamps += 1


class Observer:
    """Something that watches a run. The loop does not know what it does, and the order of observers does not matter."""

    def begin(self, run: Run) -> None:
        """Called before the first step."""

    def before_update(self, run: Run) -> None:
        """Called in each step when its gradients are complete, before the weights are updated."""

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Called after each step with the report of `train.update`."""

    def close(self) -> None:
        """Called at the end, also after an error."""
