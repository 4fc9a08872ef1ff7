"""Which folder of shards each block of a run comes from, by fixed shares: a pure function of the block's number."""

import math
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000  # blocks; finding a pattern takes about a microsecond a block and folder


def period_of(weights: list[Fraction]) -> int:
    """After how many blocks each folder has had exactly its share. weights: their shares, which sum to 1."""
    return math.lcm(*(weight.denominator for weight in weights))


def pattern_of(weights: list[Fraction]) -> list[int]:
    """The folder of each block of a period, as its index.

    Among the first n blocks, for every n, each of k folders has n times its share to within 1 - 1 / (2 k - 2) of a
    block (Tijdeman 1980, The chairman assignment problem).
    """
    period, folders = period_of(weights), range(len(weights))
    if len(weights) == 1:
        return [0]
    quotas = [int(weight * period) for weight in weights]
    slack = 2 * len(weights) - 2
    behind = [0 for _ in folders]  # how far each folder is behind its share, in blocks times `period`
    pattern = []
    for _ in range(period):
        behind = [blocks + quota for blocks, quota in zip(behind, quotas, strict=True)]
        # Of those that would not be too far ahead with this block, the one that is first too far behind without it.
        able = [index for index in folders if slack * behind[index] >= period]
        limit = (slack - 1) * period
        chosen = min(able, key=lambda index: (limit - slack * behind[index]) // (slack * quotas[index]))
        behind[chosen] -= period
        pattern.append(chosen)
    return pattern


class Mixture:
    """Blocks of several folders in a pattern that repeats."""

    def __init__(self, weights: list[Fraction]) -> None:
        """weights: the shares of the folders, which sum to 1."""
        self._pattern = np.array(pattern_of(weights))
        self._counts = np.bincount(self._pattern, minlength=len(weights))
        self._before = np.empty_like(self._pattern)  # in the period, blocks of the same folder
        for index, count in enumerate(self._counts):
            self._before[self._pattern == index] = np.arange(count)

    def locate(self, number: int) -> tuple[int, int]:
        """The index of the folder that a block comes from, and the block's number among that folder's."""
        period, position = divmod(number, len(self._pattern))
        index = int(self._pattern[position])
        return index, period * int(self._counts[index]) + int(self._before[position])

    def counts(self, blocks: int) -> list[int]:
        """How many of the first so many blocks come from each folder."""
        periods, rest = divmod(blocks, len(self._pattern))
        counts = periods * self._counts + np.bincount(self._pattern[:rest], minlength=len(self._counts))
        return counts.tolist()
