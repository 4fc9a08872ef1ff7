"""Learning rates as functions of the run's step number. Skipped updates count as steps."""

import math

from pretrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of update number `step`, counted from 0.

    All kinds warm up linearly: after n updates the rate is initial + n (peak - initial) / warmup. After that:
    inverse_sqrt: peak sqrt(warmup / n), as in fairseq's optim/lr_scheduler/inverse_square_root_schedule.py;
    linear, cosine: from the peak to the final rate at train.steps, as in transformers' optimization.py with a floor;
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
