"""Predict every token of packed blocks in which documents are prefix, suffix, middle: a causal model that infills."""

import copy

import numpy as np

from data.shards.noise import MIDDLE, PREFIX, SUFFIX, fill_in_the_middle
from pretrain.held_out import HeldOut
from pretrain.objectives.next_token import HeldOutBlocks
from pretrain.objectives.noised_blocks import HeldOutNoisedBlocks, NoisedBlocks


class FillInTheMiddle(NoisedBlocks):
    """Next-token prediction on blocks whose documents are rearranged with probability `objective.fim_rate`.

    All tokens count in the loss, those of prefix and suffix too, as in the paper (`data.shards.noise`).
    """

    reserved = MIDDLE + 1

    def settings(self) -> dict[str, float]:
        """As `NoisedBlocks.settings`."""
        return {"fim_rate": self._recipe.objective.fim_rate}

    def noised(
        self, inputs: np.ndarray, targets: np.ndarray, draws: np.random.RandomState, held_out: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `NoisedBlocks.noised`. Every held-out document is rearranged."""
        ids = self._reserved_ids
        rate = 1.0 if held_out else self._recipe.objective.fim_rate
        tokens = fill_in_the_middle(targets, self._word_ends, (ids[PREFIX], ids[SUFFIX], ids[MIDDLE]), rate, draws)
        return np.concatenate([inputs[:1], tokens[:-1]]), tokens

    def sources_of(self, name: str, blocks: HeldOutBlocks) -> dict[str, HeldOut]:
        """As `NextToken.sources_of`: the blocks as they are, and with every document rearranged."""
        rate, before = self._recipe.objective.fim_rate, f"{name}-" if len(self._folders) > 1 else ""
        plain = copy.copy(blocks)
        plain.weight = blocks.weight * (1 - rate)
        infilling = HeldOutNoisedBlocks(blocks, self, blocks.weight * rate)
        return {f"{before}left_to_right": plain, f"{before}infilling": infilling}

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        kind, figures = super().describe()
        rearranged = (
            f"{self._recipe.objective.fim_rate:.0%}: <reserved_1> prefix <reserved_2> suffix <reserved_3> middle"
        )
        return kind, {**figures, "documents rearranged to fill in the middle": rearranged}
