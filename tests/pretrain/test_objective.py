"""The objective's interface, proven by a second implementation: a masked loss whose targets vary from rank to rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.common.files import UserError
from data.common.hashing import mix64
from model.architecture import Architecture
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch
from pretrain.objectives.kinds import make_objective
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import objective_case, settings
from tests.ranks import Ranks

LENGTH = 64  # of the tests' blocks
MORE = ["train.steps=8", "train.micro_batch_size=2", "evaluate.max_blocks=4", "model.layerdrop=0.3"]


class MaskedTokens(NextToken):
    """Only some positions of a block are targets, from none to all, by a draw from the block's number."""

    empty_steps = 0
    """The first global batches have no target at all."""

    def mask(self, number: int) -> np.ndarray:
        """True for the positions of a block that count."""
        if number < self.empty_steps * 16:
            return np.zeros(LENGTH, bool)
        draws = mix64(np.arange(LENGTH) + LENGTH * number, salt=7) / 2.0**64
        return draws < (number % 4) / 3  # every fourth block has no target, every fourth has all

    def batch(self, numbers: range) -> Batch:
        inputs, targets = super().batch(numbers)
        keep = torch.from_numpy(np.stack([self.mask(number) for number in numbers]))
        return inputs, targets.masked_fill(~keep, IGNORE_INDEX)

    def counted_targets(self, numbers: range) -> int:
        return sum(int(self.mask(number).sum()) for number in numbers)


class NoTargets(MaskedTokens):
    """Its second step has no target."""

    def mask(self, number: int) -> np.ndarray:
        return super().mask(number) & (number // 16 != 1)


def plain_training(recipe: Recipe, ranks: int, kind: type[Objective]) -> tuple[list[float], Architecture]:
    """A run by plain torch in one process, the sum over each global batch by its targets: losses and trained model."""
    objective = kind(recipe)
    model = objective.build_model()
    objective.load_encoder(model)
    if recipe.model.weights:
        objective.load_weights(model, Path(recipe.model.weights))
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.optimizer.betas, weight_decay=0.01)
    size, at_once = recipe.global_batch_size(), recipe.train.micro_batch_size * ranks
    losses = []
    for step in range(recipe.train.steps):
        optimizer.zero_grad()
        counted, total = objective.counted_targets(range(step * size, (step + 1) * size)), 0.0
        for micro_step in range(size // at_once):
            first = step * size + micro_step * at_once
            batch = objective.batch(range(first, first + at_once))
            loss = model(*batch, step=step, micro_step=micro_step) / counted
            loss.backward()
            total += loss.item()
        for parameter in model.parameters():  # a dropped layer has a gradient of zero under DeepSpeed
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(total)
    return losses, model


def test_ranks_have_different_numbers_of_targets_and_some_none(sample_folder: Path, tmp_path: Path) -> None:
    """What the tests of the layouts rely on."""
    objective = MaskedTokens(load_recipe("tiny", settings(sample_folder / "shards", tmp_path)))
    counts = [objective.counted_targets(range(first, first + 1)) for first in range(0, 16)]
    assert 0 in counts and LENGTH in counts and len(set(counts)) > 4
    inputs, targets = objective.batch(range(16))
    assert (targets != IGNORE_INDEX).sum() == sum(counts) and inputs.shape == (16, LENGTH)


def test_a_global_batch_without_a_target_is_refused(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE)
    with pytest.raises(AssertionError, match=r"step 2: none of its examples \(16 to 31\) has a target"):
        two_ranks.run(objective_case, "tiny", chosen, NoTargets)


def test_inputs_that_do_not_fit_are_refused(sample_folder: Path, tmp_path: Path) -> None:
    shards = sample_folder / "shards"

    def refused(*chosen: str) -> str:
        with pytest.raises(UserError) as caught:
            make_objective(load_recipe("tiny", list(chosen))).check()
        return str(caught.value)

    assert "leave the key out" in refused("model.vocab_size=99", f"data.shards={shards}")
    assert "no such folder; expected a shards folder" in refused(f"data.shards={tmp_path / 'absent'}")
    assert "is a corpus folder; expected a shards folder" in refused(f"data.shards={sample_folder / 'corpus'}")
    small = ["model.max_position_embeddings=100000", "train.context_length=100000", "train.global_batch_tokens=100000"]
    assert "too few for blocks of 100000 tokens" in refused(f"data.shards={shards}", *small)


def test_shards_that_biogpt_train_has_verified_are_not_read_again(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective: Any = make_objective(load_recipe("tiny", settings(sample_folder / "shards", tmp_path)))
    reads: list[Path] = []
    monkeypatch.setattr("pretrain.objectives.next_token.verify_files", lambda folder, _: reads.append(folder))
    monkeypatch.setenv("BIOGPT_VERIFIED_SHARDS", objective.identity()["shards"])
    objective.verify()
    assert reads == []
    monkeypatch.setenv("BIOGPT_VERIFIED_SHARDS", "0" * 64)  # of other shards
    objective.verify()
    monkeypatch.delenv("BIOGPT_VERIFIED_SHARDS")
    objective.verify()
    assert reads == [sample_folder / "shards"] * 2


def test_epochs_of_a_folder_count_its_blocks(sample_folder: Path, tmp_path: Path) -> None:
    """A block of 64 targets at any offset of 0 to 63: what is left of the tokens after 63 makes the blocks."""
    from data.common.files import read_manifest

    objective = make_objective(load_recipe("tiny", settings(sample_folder / "shards", tmp_path)))
    tokens = read_manifest(sample_folder / "shards", "shards")["counts"]["train"]["tokens"]
    assert objective.epochs(0) == {"train": 0.0}
    assert objective.epochs(1_000) == {"train": 1_000 / ((tokens - 63) // 64)}
