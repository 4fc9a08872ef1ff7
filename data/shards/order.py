"""The order of training examples: epoch after epoch, each shuffled on its own. A pure function of (seed, number)."""

import numpy as np

from data.common.hashing import mix64


def epoch_salt(seed: int, epoch: int, use: int) -> int:
    """A number of 64 bits that is drawn from the seed, for each epoch and each of two uses of it (0 and 1)."""
    return int(mix64(np.array([2 * epoch + use]), salt=seed)[0])


class EpochOrder:
    """The examples of a run by their numbers, from 0 without end."""

    def __init__(self, examples: int, seed: int) -> None:
        """examples: how many there are in an epoch."""
        self.examples, self._seed = examples, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """The epoch that example `number` of the run belongs to, and its place among the examples."""
        epoch, position = divmod(number, self.examples)
        return epoch, int(self._places(epoch)[position])

    def places(self, numbers: range) -> np.ndarray:
        """The places among the examples of those with these numbers, int64."""
        parts, number = [np.zeros(0, np.int64)], numbers.start
        while number < numbers.stop:
            epoch, position = divmod(number, self.examples)
            parts.append(self._places(epoch)[position : position + numbers.stop - number])
            number += len(parts[-1])
        return np.concatenate(parts)

    def _places(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.arange(self.examples)
            salt = epoch_salt(self._seed, epoch, 0)
            # In place: 8 bytes an example are all it takes. RandomState's stream is frozen; Generator's may change.
            np.random.RandomState([salt % 2**32, salt // 2**32]).shuffle(self._order)
        return self._order
