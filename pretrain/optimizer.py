"""Optimizers: parameter groups, kinds, the states that a checkpoint stores, and how a resume restores them.

To add a kind, write a subclass of `OptimizerKind`, enter it in KINDS and in the recipe's choices of `optimizer.kind`,
and test it. `engine.py` gathers and restores the states that a kind names, at every ZeRO stage; no other file knows
them.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from model.architecture import Architecture
from pretrain.recipe import OptimizerSection, Recipe

Groups = list[dict[str, Any]]
"""As torch's optimizers take them, each with two keys of ours.

"states": the names of the tensors that the optimizer keeps for each parameter of the group. Each must have the
parameter's shape. "rate_multiplier": the schedule's learning rate is multiplied by it.
"""


class OptimizerKind(ABC):
    """One way to compute updates."""

    record: str
    """Its name in checkpoints. A run is not resumed with another kind."""
    offloaded_record: str
    """Its name in checkpoints when `deepspeed.offload_optimizer` keeps it on the CPU."""

    @abstractmethod
    def groups(self, parameters: dict[str, Parameter], settings: OptimizerSection) -> Groups:
        """The parameter groups of a model, given its parameters by name."""

    @abstractmethod
    def build(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """The optimizer of these groups."""

    @abstractmethod
    def build_offloaded(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """The same on the CPU, in an implementation that DeepSpeed can offload. Raises UserError if there is none."""


class AdamW(OptimizerKind):
    """AdamW, as torch has it (Loshchilov and Hutter 2019), or DeepSpeed's CPU Adam when offloaded."""

    record, offloaded_record = "torch.optim.AdamW", "deepspeed.ops.adam.DeepSpeedCPUAdam"
    states = ("exp_avg", "exp_avg_sq")

    def groups(self, parameters: dict[str, Parameter], settings: OptimizerSection) -> Groups:
        """One group, or two where biases and norms are not decayed."""
        everything = list(parameters.values())
        groups: Groups = [{"params": everything}]
        if not settings.decay_biases_and_norms:
            groups = [
                {"params": [parameter for parameter in everything if parameter.dim() > 1]},
                {"params": [parameter for parameter in everything if parameter.dim() < 2], "weight_decay": 0.0},
            ]
        return [group | {"states": self.states, "rate_multiplier": 1.0} for group in groups]

    def build(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """As `OptimizerKind.build`."""
        return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **self._options(settings))

    def build_offloaded(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """As `OptimizerKind.build_offloaded`."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **self._options(settings))

    def _options(self, settings: OptimizerSection) -> dict[str, Any]:
        return {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "eps": settings.epsilon,
            "weight_decay": settings.weight_decay,
        }


KINDS: dict[str, OptimizerKind] = {"adamw": AdamW()}


def optimizer_record(recipe: Recipe) -> str:
    """What computes the updates of a run, as checkpoints record it. Another implementation would round differently."""
    kind = KINDS[recipe.optimizer.kind]
    return kind.offloaded_record if recipe.deepspeed.offload_optimizer else kind.record


class Optimizer:
    """The optimizer of a run, and the names of the states that its checkpoints store."""

    def __init__(self, recipe: Recipe, model: Architecture) -> None:
        kind, parameters = KINDS[recipe.optimizer.kind], dict(model.named_parameters())
        groups = kind.groups(parameters, recipe.optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.states: dict[str, tuple[str, ...]] = {
            names[id(parameter)]: group["states"] for group in groups for parameter in group["params"]
        }
        """Parameter name -> the names of its states."""
        build = kind.build_offloaded if recipe.deepspeed.offload_optimizer else kind.build
        self.torch = build(groups, recipe.optimizer)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all states, each once. A checkpoint has one file for each."""
        return tuple(dict.fromkeys(state for states in self.states.values() for state in states))

    def set_learning_rate(self, rate: float) -> None:
        """Set the schedule's rate for the next step. A multiplier of 1 leaves it as it is, to the last bit."""
        for group in self.torch.param_groups:
            group["lr"] = rate * group["rate_multiplier"]

    def restore_update_count(self, updates: int) -> None:
        """Restore the number of updates so far, on which bias corrections depend."""
        for state in self.torch.state.values():
            if "step" in state:
                counted = state["step"]  # a tensor in torch's AdamW, a number in DeepSpeed's
                state["step"] = torch.full_like(counted, updates) if isinstance(counted, Tensor) else updates
