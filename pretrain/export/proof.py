"""The proof of an export: transformers loads the folder and must find what our model and the run's record say."""

from pathlib import Path
from typing import Any

import torch

from model.architecture import Architecture
from pretrain.held_out import PROBE_EXAMPLES, held_out_loss, to_device
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe

LOSS_BOUND = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""How far the export's held-out loss may be from the run's, in nats a target, by the less precise of the two: the run's
precision and the exported one. The mean of checkpoints has no recorded loss, so ours in fp32 takes its place."""
OUTPUTS_BOUND = 1e-4
"""How far the outputs of transformers' model may be from ours, for two held-out examples."""


@torch.no_grad()
def prove(
    folder: Path,
    model: Architecture,
    objective: Objective,
    recipe: Recipe,
    state: dict[str, Any] | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Compare transformers' model of a folder with ours, by its logits and its held-out loss.

    state: of the checkpoint, whose recorded loss is compared; None means that our model's loss is computed, as the mean
    of several checkpoints needs. dtype: of the exported weights; afterwards the model has weights rounded to it. The
    logits are compared in fp32, for the same weights, and the loss in this dtype. Returns the figures compared. Raises
    RuntimeError if the folder does not hold the model that was trained.
    """
    device, sources = next(model.parameters()).device, objective.held_out()
    batch_size = min(recipe.train.micro_batch_size, 8)
    if state:
        precision, (expected, max_examples) = state["probe"]["precision"], recorded_loss(recipe, state)
    else:
        precision, max_examples = "fp32", 0
        expected = held_out_loss(model, sources, batch_size, device)["loss"]
    model.to(dtype).float()
    exported = objective.load_exported(folder, device)
    held_out = next(iter(sources.values()))
    examples = range(min(2, held_out.examples))
    batch = to_device(held_out.batch(examples, len(examples)), device)
    difference = float((exported.outputs(*batch) - objective.outputs(model, batch)).abs().max())
    if not difference <= OUTPUTS_BOUND:
        raise RuntimeError(f"export: transformers' logits differ from the decoder's by {difference:.2e}")
    exported.model.to(dtype)
    found = held_out_loss(exported.loss, sources, batch_size, device, max_examples)
    bound = max(LOSS_BOUND[precision], LOSS_BOUND["fp32" if dtype == torch.float32 else "bf16"])
    if not abs(found["loss"] - expected) <= bound:
        whose = f"the run recorded {expected:.6f} at step {state['step']}" if state else f"ours is {expected:.6f}"
        raise RuntimeError(
            f"export: transformers' held-out loss is {found['loss']:.6f}, {whose}; they may differ by {bound}"
        )
    named = {"recorded_loss" if state else "computed_loss": expected}
    return {**named, "held_out": found, "largest_logit_difference": difference}


def recorded_loss(recipe: Recipe, state: dict[str, Any]) -> tuple[float, int]:
    """The held-out loss that a run recorded at its checkpoint, and over how many examples of each source (0: all)."""
    if state["held_out"].get("step") == state["step"]:
        # Earlier versions did not record how many examples were evaluated: the recipe's number, then.
        return state["held_out"]["loss"], state["held_out"].get("max_examples", recipe.evaluate.max_blocks)
    return state["probe"]["loss"], PROBE_EXAMPLES  # a run stopped between two evaluations has only its probe
