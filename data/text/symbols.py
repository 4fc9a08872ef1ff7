"""The words of a text as symbols, whose pairs `learn_bpe` merges.

A symbol is a letter or the product of a merge. The last symbol of a word ends in `</w>` (see `bpe`).
"""

from collections import Counter

import numpy as np

from data.text.bpe import END_OF_WORD

LAST_LETTER = 2**21  # added to the code point of the last letter of a word, which is a symbol of its own
BETWEEN, GONE = -1, -2  # in place of a symbol: between two words; joined to the symbol before


class SymbolsOfWords:
    """All words as one array of symbol numbers, with BETWEEN before the first, between two, and after the last.

    A place is an index into this array. `before` and `after` link the places whose symbol is not GONE.
    """

    def __init__(self, word_counts: Counter[str]) -> None:
        lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
        self.ends = np.append(0, np.cumsum(lengths + 1))  # the places of BETWEEN
        inside = np.ones(self.ends[-1] + 1, bool)
        inside[self.ends] = False
        codes = np.zeros(len(inside), np.int32)  # code point + 1 of each letter, 0 between words
        codes[inside] = np.frombuffer("".join(word_counts).encode("utf-32-le", "surrogatepass"), np.int32) + 1
        codes[self.ends[1:] - 1] += LAST_LETTER
        number_of = np.zeros(2 * LAST_LETTER, np.int32)  # code -> number of the symbol: 0, 1 ... for those that occur
        number_of[codes] = 1
        letters = np.flatnonzero(number_of)
        number_of[letters] = np.arange(len(letters)) + BETWEEN
        self.symbols = number_of[codes]
        self.names = [
            chr(code % LAST_LETTER - 1) + END_OF_WORD * (code >= LAST_LETTER) for code in letters[1:].tolist()
        ]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.counts = np.zeros(len(codes), np.int64)  # of each symbol's word
        self.counts[inside] = np.repeat(np.fromiter(word_counts.values(), np.int64, len(word_counts)), lengths)
        places = np.arange(len(codes), dtype=np.int32)
        self.before, self.after = places - 1, np.minimum(places + 1, len(codes) - 1, dtype=np.int32)

    def symbol(self, name: str) -> int:
        """The number of the symbol with this name. A new name gets a new number."""
        number = self.numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def words_at(self, places: np.ndarray) -> np.ndarray:
        """The numbers of the words to which these places belong."""
        return np.searchsorted(self.ends, places) - 1

    def places(self, word: int) -> list[int]:
        """The places of a word's symbols, in order."""
        places, place = [], int(self.ends[word]) + 1
        while self.symbols[place] != BETWEEN:
            places.append(place)
            place = int(self.after[place])
        return places
