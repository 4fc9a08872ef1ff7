"""The proof of an export: transformers loads the folder and must find what our model and the run's record say."""

from pathlib import Path
from typing import Any

import torch

from model.architecture import Architecture
from pretrain.held_out import PROBE_EXAMPLES, held_out_loss, to_device
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe

LOSS_BOUND = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""How far the export's held-out loss, in fp32, may be from the run's, in its own precision, in nats a target."""
OUTPUTS_BOUND = 1e-4
"""How far the outputs of transformers' model may be from ours, for two held-out examples."""


@torch.no_grad()
def prove(
    folder: Path, model: Architecture, objective: Objective, recipe: Recipe, state: dict[str, Any]
) -> dict[str, Any]:
    """Compare transformers' model of a folder with ours and with the loss that the run recorded.

    Returns the figures compared. Raises RuntimeError if the folder does not hold the model that was trained.
    """
    device = next(model.parameters()).device
    exported = objective.load_exported(folder, device)
    sources = objective.held_out()
    held_out = next(iter(sources.values()))
    examples = range(min(2, held_out.examples))
    batch = to_device(held_out.batch(examples, len(examples)), device)
    difference = float((exported.outputs(*batch) - objective.outputs(model, batch)).abs().max())
    if not difference <= OUTPUTS_BOUND:
        raise RuntimeError(f"export: transformers' logits differ from the decoder's by {difference:.2e}")
    recorded, max_examples = recorded_loss(recipe, state)
    batch_size = min(recipe.train.micro_batch_size, 8)
    found = held_out_loss(exported.loss, sources, batch_size, device, max_examples)
    bound = LOSS_BOUND[state["probe"]["precision"]]
    if not abs(found["loss"] - recorded) <= bound:
        raise RuntimeError(
            f"export: transformers' held-out loss is {found['loss']:.6f}, the run recorded {recorded:.6f} at step"
            f" {state['step']}; they may differ by {bound}"
        )
    return {"recorded_loss": recorded, "held_out": found, "largest_logit_difference": difference}


def recorded_loss(recipe: Recipe, state: dict[str, Any]) -> tuple[float, int]:
    """The held-out loss that a run recorded at its checkpoint, and over how many examples of each source (0: all)."""
    if state["held_out"].get("step") == state["step"]:
        # Earlier versions did not record how many examples were evaluated: the recipe's number, then.
        return state["held_out"]["loss"], state["held_out"].get("max_examples", recipe.evaluate.max_blocks)
    return state["probe"]["loss"], PROBE_EXAMPLES  # a run stopped between two evaluations has only its probe
