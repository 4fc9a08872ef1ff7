"""Learning rates against fairseq's own stepwise computation."""

import itertools

import pytest
import torch
from transformers import get_scheduler

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


def transformers_rates(name: str, warmup: int, steps: int, peak: float) -> list[float]:
    """The rates of transformers' own scheduler, step by step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_linear_and_cosine_are_transformers(kind: str) -> None:
    chosen = [f"schedule.kind={kind}", "train.steps=50", "schedule.warmup_steps=7", "schedule.initial_learning_rate=0"]
    recipe = load_recipe("tiny", [*chosen, "optimizer.learning_rate=0.3"])
    expected = transformers_rates(kind, 7, 50, 0.3)
    assert [learning_rate(recipe, step) for step in range(50)] == pytest.approx(expected, abs=1e-12)


def test_wsd_is_stable_then_falls_to_the_final_rate() -> None:
    chosen = ["schedule.kind=wsd", "train.steps=100", "schedule.warmup_steps=10", "schedule.decay_steps=20"]
    recipe = load_recipe("tiny", [*chosen, "optimizer.learning_rate=1.0", "schedule.final_learning_rate=0.1"])
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(one < other for one, other in itertools.pairwise(rates[:11]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_every_schedule_ends_at_its_final_rate(kind: str) -> None:
    chosen = [f"schedule.kind={kind}", *["schedule.decay_steps=5"] * (kind == "wsd")]
    recipe = load_recipe("tiny", [*chosen, "schedule.final_learning_rate=1e-4"])
    assert learning_rate(recipe, recipe.train.steps) == pytest.approx(1e-4)
