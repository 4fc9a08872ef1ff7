"""Learning rates against fairseq's own stepwise computation."""

import pytest

from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate


def test_inverse_sqrt_is_fairseqs() -> None:
    """InverseSquareRootSchedule of fairseq 0.12, as it is written there."""
    recipe = load_recipe("biogpt")
    warmup_init_lr, warmup_end_lr, warmup_updates = 1e-7, 2e-4, 20_000
    lr_step = (warmup_end_lr - warmup_init_lr) / warmup_updates
    decay_factor = warmup_end_lr * warmup_updates**0.5
    for num_updates in (0, 1, 2, 10_000, 19_999, 20_000, 20_001, 80_000, 199_999):
        if num_updates < warmup_updates:
            expected = warmup_init_lr + num_updates * lr_step
        else:
            expected = decay_factor * num_updates**-0.5
        assert learning_rate(recipe, num_updates) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    recipe = load_recipe("tiny", ["schedule.warmup_steps=0", "optimizer.learning_rate=0.5"])
    assert learning_rate(recipe, 0) == learning_rate(recipe, 1) == 0.5
