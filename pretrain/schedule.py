"""Learning rates as functions of our own step."""

import math

from pretrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of update number `step` (from 0): fairseq's inverse_sqrt.

    n updates done: initial + n (peak - initial) / warmup below warmup, then peak sqrt(warmup / n)
    (fairseq/optim/lr_scheduler/inverse_square_root_schedule.py). Without warm-up the decay starts from update 1.
    """
    peak, warmup = recipe.optimizer.learning_rate, recipe.schedule.warmup_steps
    initial = recipe.schedule.initial_learning_rate
    if step < warmup:
        return initial + step * (peak - initial) / warmup
    return peak * math.sqrt(max(warmup, 1) / max(step, 1))
