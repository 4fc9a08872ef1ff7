"""Learning rates as functions of our own step, which a skipped update does not hold back."""

import math

from pretrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of update number `step`, from 0.

    All kinds warm up linearly: initial + n (peak - initial) / warmup after n updates. Then
    inverse_sqrt: peak sqrt(warmup / n), fairseq's optim/lr_scheduler/inverse_square_root_schedule.py;
    linear, cosine: from the peak to the final rate at train.steps (transformers' optimization.py, with a floor);
    wsd: the peak, then linear to the final rate over the last decay_steps (Hu et al. 2024, MiniCPM).
    """
    schedule, peak, steps = recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps
    warmup, final = schedule.warmup_steps, schedule.final_learning_rate
    if step < warmup:
        return schedule.initial_learning_rate + step * (peak - schedule.initial_learning_rate) / warmup
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step, 1))
    start = steps - schedule.decay_steps if schedule.kind == "wsd" else warmup
    done = min(max(step - start, 0) / max(steps - start, 1), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return final + (peak - final) * left
