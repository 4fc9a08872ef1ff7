"""The hash behind all orders and splits. It is the same on every machine and in every version of numpy."""

import numpy as np


def mix64(values: np.ndarray, salt: int) -> np.ndarray:
    """An evenly spread uint64 for each integer: the finalizer of splitmix64 (Steele, Lea and Flood 2014).

    salt: another salt gives an unrelated hash.
    """
    offset = (0x9E3779B97F4A7C15 * (salt + 1)) % 2**64
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(offset)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
