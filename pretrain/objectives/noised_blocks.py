"""What the objectives share that learn from blocks with something missing: the reserved ids, batches, evaluation."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.common.files import UserError
from data.shards.noise import draws_of, word_ends
from data.text.ids import reserved_ids
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch, HeldOut
from pretrain.objectives.next_token import HeldOutBlocks, NextToken
from pretrain.recipe import Recipe

HELD_OUT_SEED = 0
"""Of the noise in held-out blocks. It is the same for all runs, so that their losses can be compared."""


class NoisedBlocks(NextToken):
    """Learn from the blocks of `NextToken`, changed by noise that is a pure function of (seed, block number)."""

    reserved: int
    """How many reserved ids the tokenizer must have."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._reserved_ids = reserved_ids(self.tokenizer)
        if len(self._reserved_ids) < self.reserved:
            raise UserError(
                f'objective.kind = "{recipe.objective.kind}": needs {self.reserved} reserved ids, but {self.tokenizer}'
                f" has {len(self._reserved_ids)}; make a tokenizer with `biogpt tokenizer --reserve 8`, and shards with"
                " it"
            )
        self._word_ends = word_ends(self.tokenizer)

    @abstractmethod
    def noised(
        self, inputs: np.ndarray, targets: np.ndarray, draws: np.random.RandomState, held_out: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The two rows of a batch that a block becomes. The first is never longer than the block, the second as long.

        inputs, targets: (T,) int64 of a block, without padding.
        """

    @abstractmethod
    def settings(self) -> dict[str, float]:
        """The recipe's settings of the noise, by name."""

    def read(self, numbers: range) -> tuple[Tensor, Tensor]:
        """As `NextToken.read`, with noise."""
        return self.with_noise(super().read(numbers), numbers, self._recipe.train.seed, held_out=False)

    def with_noise(self, batch: Batch, numbers: range, seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
        """The batch of these blocks with their noise. Rows after theirs stay as they are."""
        inputs_BT, targets_BT = (tensor.numpy() for tensor in batch)
        noised = torch.full_like(batch[0], self.config.pad_token_id), torch.full_like(batch[1], IGNORE_INDEX)
        for row, number in enumerate(numbers):
            length = np.count_nonzero(targets_BT[row] != IGNORE_INDEX)
            pair = self.noised(inputs_BT[row, :length], targets_BT[row, :length], draws_of(seed, number), held_out)
            for whole, values in zip(noised, pair, strict=True):
                whole[row, : len(values)] = torch.from_numpy(values)
        return noised

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`."""
        return {**super().identity(), **self.settings()}


class HeldOutNoisedBlocks(HeldOut):
    """Held-out blocks with noise that is always the same."""

    def __init__(self, blocks: HeldOutBlocks, objective: NoisedBlocks, weight: float) -> None:
        self._blocks, self._objective, self.weight = blocks, objective, weight
        self.examples = blocks.examples

    def batch(self, numbers: range, batch_size: int) -> Batch:
        """As of the blocks, with noise."""
        return self._objective.with_noise(self._blocks.batch(numbers, batch_size), numbers, HELD_OUT_SEED, True)

    def counted_targets(self, numbers: range) -> int:
        """As `HeldOut.counted_targets`: as many as without noise."""
        return self._blocks.counted_targets(numbers)

    def figures(self, loss: float) -> dict[str, float]:
        """None: the loss of a block with noise says nothing about the bytes of its text."""
        return {}
