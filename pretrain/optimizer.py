"""Optimizers: parameter groups, kinds, the states that a checkpoint stores, and how a resume restores them.

To add a kind, write a subclass of `OptimizerKind`, enter it in KINDS and in the recipe's choices of `optimizer.kind`,
and test it. `engine.py` gathers and restores the states that a kind names, at every ZeRO stage; no other file knows
them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from model.architecture import Architecture
from pretrain.muon import Muon
from pretrain.recipe import OptimizerSection, Recipe
from pretrain.tensor_file import Fragment

Groups = list[dict[str, Any]]
"""As torch's optimizers take them, each with three keys of ours.

"rule": what the log calls the way in which these parameters are updated. "states": the names of the tensors that the
optimizer keeps for each parameter of the group. Each must have the parameter's shape. "rate_multiplier": the schedule's
learning rate is multiplied by it.
"""


class OptimizerKind(ABC):
    """One way to compute updates."""

    record: str
    """Its name in checkpoints. A run is not resumed with another kind."""
    offloaded_record: str
    """Its name in checkpoints when `deepspeed.offload_optimizer` keeps it on the CPU."""

    @abstractmethod
    def groups(self, model: Architecture, settings: OptimizerSection) -> Groups:
        """The parameter groups of a model."""

    @abstractmethod
    def build(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """The optimizer of these groups."""

    @abstractmethod
    def build_offloaded(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """The same on the CPU, by an optimizer that DeepSpeed can offload. The recipe refuses kinds that have none."""


class AdamW(OptimizerKind):
    """AdamW, as torch has it (Loshchilov and Hutter 2019), or DeepSpeed's CPU Adam when offloaded."""

    record, offloaded_record = "torch.optim.AdamW", "deepspeed.ops.adam.DeepSpeedCPUAdam"
    states = ("exp_avg", "exp_avg_sq")

    def groups(self, model: Architecture, settings: OptimizerSection) -> Groups:
        """One group, or two where biases and norms are not decayed."""
        return self._groups(list(model.parameters()), settings)

    def _groups(self, parameters: list[Parameter], settings: OptimizerSection) -> Groups:
        groups: Groups = [{"params": parameters}]
        if not settings.decay_biases_and_norms:
            groups = [
                {"params": [parameter for parameter in parameters if parameter.dim() > 1]},
                {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
            ]
        return [group | {"rule": "AdamW", "states": self.states, "rate_multiplier": 1.0} for group in groups]

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


class MuonKind(AdamW):
    """Muon for the hidden matrices, AdamW for everything else, at the same rate."""

    record = "pretrain.muon.Muon"

    def groups(self, model: Architecture, settings: OptimizerSection) -> Groups:
        """The hidden matrices, then the groups of AdamW."""
        hidden, parameters = model.hidden_matrices(), dict(model.named_parameters())
        stacks = {}
        for name, count in hidden.items():
            rows, columns = parameters[name].shape
            stacks[name] = [(rows // count, columns)] * count
        matrices = {
            "params": [parameters[name] for name in hidden],
            "rule": "Muon",
            "states": ("momentum",),
            "rate_multiplier": 1.0,
            "matrices": stacks,
        }
        return [matrices, *self._groups([each for name, each in parameters.items() if name not in hidden], settings)]

    def build(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """As `OptimizerKind.build`."""
        chosen = settings.momentum, settings.newton_schulz_precision
        return Muon(groups, *chosen, fused=torch.cuda.is_available(), **self._options(settings))

    def build_offloaded(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        """DeepSpeed has none, and the recipe refuses it."""
        raise NotImplementedError


KINDS: dict[str, OptimizerKind] = {"adamw": AdamW(), "muon": MuonKind()}


def optimizer_record(recipe: Recipe) -> str:
    """What computes the updates of a run, as checkpoints record it. Another implementation would round differently."""
    kind = KINDS[recipe.optimizer.kind]
    return kind.offloaded_record if recipe.deepspeed.offload_optimizer else kind.record


class Optimizer:
    """The optimizer of a run, and the names of the states that its checkpoints store."""

    def __init__(self, recipe: Recipe, model: Architecture) -> None:
        kind, parameters = KINDS[recipe.optimizer.kind], dict(model.named_parameters())
        groups = kind.groups(model, recipe.optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.states: dict[str, tuple[str, ...]] = {
            names[id(parameter)]: group["states"] for group in groups for parameter in group["params"]
        }
        """Parameter name -> the names of its states."""
        self.rules = {names[id(parameter)]: group["rule"] for group in groups for parameter in group["params"]}
        """Parameter name -> how it is updated."""
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self.numbers = {"model": sum(sizes.values())}
        """What a checkpoint holds: "model" and the states -> how many numbers, over all ranks."""
        for name, states in self.states.items():
            for state in states:
                self.numbers[state] = self.numbers.get(state, 0) + sizes[name]
        build = kind.build_offloaded if recipe.deepspeed.offload_optimizer else kind.build
        self.torch = build(groups, recipe.optimizer)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all states, each once. A checkpoint has one file for each."""
        return tuple(kind for kind in self.numbers if kind != "model")

    def locate(self, fragments: Iterable[Fragment]) -> None:
        """Tell the optimizer where the model's parameters are, once DeepSpeed has put them into flat pieces.

        fragments: views of the fp32 weights that this rank holds.
        """
        if isinstance(self.torch, Muon):
            self.torch.locate(fragments)

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
