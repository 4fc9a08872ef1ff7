"""Which folder of shards or records each example of a run comes from, by fixed shares: a pure function of its number.

A folder's own examples have an order of their own, epoch after epoch. An example is a block of tokens or a record.
"""

import math
from fractions import Fraction

import numpy as np

from data.common.hashing import mix64
from data.shards.order import EpochOrder

LONGEST_PERIOD = 100_000  # examples; finding a pattern takes about a microsecond an example and folder


def period_of(weights: list[Fraction]) -> int:
    """After how many examples each folder has had exactly its share. weights: their shares, which sum to 1."""
    return math.lcm(*(weight.denominator for weight in weights))


def pattern_of(weights: list[Fraction]) -> list[int]:
    """The folder of each example of a period, as its index.

    Among the first n examples, for every n, each of k folders has n times its share to within 1 - 1 / (2 k - 2) of an
    example (Tijdeman 1980, The chairman assignment problem).
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
    """Examples of several folders in a pattern that repeats."""

    def __init__(self, weights: list[Fraction]) -> None:
        """weights: the shares of the folders, which sum to 1."""
        self._pattern = np.array(pattern_of(weights))
        self._counts = np.bincount(self._pattern, minlength=len(weights))
        self._before = np.empty_like(self._pattern)  # in the period, examples of the same folder
        for index, count in enumerate(self._counts):
            self._before[self._pattern == index] = np.arange(count)

    def locate(self, number: int) -> tuple[int, int]:
        """The index of the folder that an example comes from, and the example's number among that folder's."""
        period, position = divmod(number, len(self._pattern))
        index = int(self._pattern[position])
        return index, period * int(self._counts[index]) + int(self._before[position])

    def folders(self, numbers: range) -> np.ndarray:
        """The index of the folder of each of these examples."""
        return self._pattern[np.arange(numbers.start, numbers.stop) % len(self._pattern)]

    def counts(self, examples: int) -> list[int]:
        """How many of the first so many examples come from each folder."""
        periods, rest = divmod(examples, len(self._pattern))
        counts = periods * self._counts + np.bincount(self._pattern[:rest], minlength=len(self._counts))
        return counts.tolist()

    def seeds(self, seed: int) -> list[int]:
        """A seed for each folder, drawn from the run's. The first folder has that itself, as a folder alone does."""
        others = range(1, len(self._counts))
        return [seed, *(int(mix64(np.array([index]), salt=seed)[0]) for index in others)]

    def epochs(self, examples: int, of_folders: list[int]) -> list[float]:
        """How often the first so many examples go through each folder, which has `of_folders` examples itself."""
        return [count / own for count, own in zip(self.counts(examples), of_folders, strict=True)]


class MixedOrder:
    """The examples of a run by their numbers, as places in a list of all examples, one folder after the other."""

    def __init__(self, of_folders: list[int], weights: list[Fraction], seed: int) -> None:
        """of_folders: how many examples each folder has; weights: the shares of the folders, which sum to 1."""
        self._mixture, self._of_folders = Mixture(weights), of_folders
        self._orders = [EpochOrder(*each) for each in zip(of_folders, self._mixture.seeds(seed), strict=True)]
        self._starts = [sum(of_folders[:index]) for index in range(len(of_folders))]

    def places(self, numbers: range) -> np.ndarray:
        """The places of these examples, int64."""
        folders, places = self._mixture.folders(numbers), np.empty(len(numbers), np.int64)
        own = zip(self._mixture.counts(numbers.start), self._mixture.counts(numbers.stop), strict=True)
        for index, (start, stop) in enumerate(own):
            places[folders == index] = self._starts[index] + self._orders[index].places(range(start, stop))
        return places

    def total(self, values: np.ndarray, numbers: range) -> int:
        """The sum over these examples, of any number, of a whole number that each place has."""
        return self._total_of_first(values, numbers.stop) - self._total_of_first(values, numbers.start)

    def _total_of_first(self, values: np.ndarray, examples: int) -> int:
        total = 0
        for start, order, count in zip(self._starts, self._orders, self._mixture.counts(examples), strict=True):
            of_folder = values[start : start + order.examples]
            epochs, rest = divmod(count, order.examples)
            last = of_folder[order.places(range(count - rest, count))]
            total += epochs * int(of_folder.sum()) + int(last.sum())
        return total

    def epochs(self, examples: int) -> list[float]:
        """As `Mixture.epochs`."""
        return self._mixture.epochs(examples, self._of_folders)
