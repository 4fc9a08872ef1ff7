"""Which words of a text are masked for infilling: spans as BART draws them (Lewis et al. 2020, section 2.2)."""

import math
from fractions import Fraction

import numpy as np

MASKED = Fraction(3, 10)
"""The share of the words that are masked."""
MEAN_LENGTH = 3
"""Of the Poisson distribution of the words of a span."""


def draw_spans(words: int, draw: np.random.RandomState) -> list[tuple[int, int]]:
    """The spans to mask in a text of so many words, in order: the first word of each and how many words it has.

    Together they have MASKED of the words, rounded up. A span of no word is a mask between two words, as in BART. At
    least one word stays between two spans, so a text of a few words may have fewer masked words.
    """
    lengths, left = [], math.ceil(MASKED * words)
    while left:
        lengths.append(min(int(draw.poisson(MEAN_LENGTH)), left))
        left -= lengths[-1]
    places = words - sum(lengths) + 1  # before, between and after the words that stay
    lengths = lengths[:places]
    stay = np.sort(draw.permutation(places)[: len(lengths)]).tolist()  # how many of those stand before each span
    return [(before + sum(lengths[:index]), lengths[index]) for index, before in enumerate(stay)]
