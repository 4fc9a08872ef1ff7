"""Which of many given passages does a text hold? Found by runs of 50 letters, whatever stands between the letters.

The rule joins two published ones. As in GPT-4's check (OpenAI 2023, appendix C), texts are compared as runs of 50
characters once all but letters and digits is removed. As in PaLM's (Chowdhery et al. 2022, section 8), a passage counts
as found if a share of its runs is found, and here all of them must be found in one text:

    A text holds a passage if it holds more than half of the runs of 50 letters that start at every tenth letter of it.

So neither case, white space, punctuation, tokenization nor Unicode's forms matter, a passage may be a part of the text,
and labels inside the text or a few other words do not hide it. A passage of fewer than 50 letters is never found: such
sentences ("Further studies are needed to confirm our results.") stand in many texts.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from data.common.hashing import mix64
from data.corpus.duplicates import NOT_COMPARED

RUN = 50  # letters, in bytes of UTF-8
STEP = 10  # letters from the start of a passage's run to that of the next
SHARE = 0.5  # of a passage's runs: more than this must be found
VERSION = 1  # of the rule. Raise it whenever another passage is found in any text
NOT_LETTERS = re.compile(r"[\W_]+")  # also combining marks, so "é" is "e" once it is decomposed
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 2**64)
BYTES = mix64(np.arange(256), salt=2)
KNOWN_BITS = 24  # a table of 16 MB says for the first bits of a hash whether any run has them
LETTERS_AT_ONCE = 1 << 18  # of texts: the arrays of that many fit a processor's cache


def letters(text: str) -> bytes:
    """The letters and digits of a text in UTF-8, without case, accents and compatibility forms (NFKD)."""
    if text.isascii():
        return text.lower().encode().translate(None, NOT_COMPARED)
    return NOT_LETTERS.sub("", unicodedata.normalize("NFKD", text).casefold()).encode()


def is_long_enough(passage: str) -> bool:
    """Whether a passage can be found at all."""
    return len(letters(passage)) >= RUN


def run_hashes(content: np.ndarray) -> np.ndarray:
    """A uint64 for the run of RUN bytes that starts at each byte of a uint8 array: Karp and Rabin's hash, mixed."""
    powers = np.cumprod(np.full(len(content), BASE, np.uint64))
    inverses = np.cumprod(np.full(max(len(content) - RUN + 1, 0), INVERSE, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(BYTES[content] * powers)])
    return mix64((sums[RUN:] - sums[:-RUN]) * inverses, salt=2)


class Passages:
    """Passages, made ready to be looked for. 20,000 of them take about 30 MB."""

    def __init__(self, passages: Iterable[str]) -> None:
        content = [letters(passage) for passage in passages]
        starts = np.cumsum([0, *map(len, content)])
        runs = [np.arange(start, end - RUN + 1, STEP) for start, end in pairwise(starts)]
        hashes = run_hashes(np.frombuffer(b"".join(content), np.uint8))[np.concatenate([np.empty(0, np.int64), *runs])]
        passage = np.repeat(np.arange(len(runs)), [len(each) for each in runs])
        order = np.argsort(hashes, kind="stable")
        self._runs = np.array([len(each) for each in runs], np.int64)  # of each passage
        self._hashes, self._passage = hashes[order], passage[order]
        self._known = np.zeros(1 << KNOWN_BITS, bool)
        self._known[hashes >> np.uint64(64 - KNOWN_BITS)] = True

    def find(self, texts: Iterable[str]) -> Iterator[tuple[int, int, float]]:
        """(number of the text, number of the passage, share of its runs) for each passage that a text holds."""
        if not len(self._hashes):
            return
        held: list[bytes] = []
        first = size = 0
        for content in map(letters, texts):
            held.append(content)
            size += len(content)
            if size >= LETTERS_AT_ONCE:
                yield from self._find(held, first)
                first, size, held = first + len(held), 0, []
        yield from self._find(held, first)

    def _find(self, texts: list[bytes], first: int) -> Iterator[tuple[int, int, float]]:
        """As `find`, of texts that are given as their letters and numbered from `first`."""
        hashes, ends = run_hashes(np.frombuffer(b"".join(texts), np.uint8)), np.cumsum([len(text) for text in texts])
        start = np.flatnonzero(self._known[hashes >> np.uint64(64 - KNOWN_BITS)])
        text = np.searchsorted(ends, start, "right")
        found, left = hashes[start], np.searchsorted(self._hashes, hashes[start])
        is_run = (start + RUN <= ends[text]) & (self._hashes[np.minimum(left, len(self._hashes) - 1)] == found)
        text, left, right = text[is_run], left[is_run], np.searchsorted(self._hashes, found[is_run], "right")
        # Each run found is one entry of `_hashes`, or several if passages share it. A text counts it once.
        text, entry = np.repeat(text, right - left), _ranges(left, right)
        text, entry = np.divmod(np.unique(text * len(self._hashes) + entry), len(self._hashes))
        pairs, runs = np.unique(text * len(self._runs) + self._passage[entry], return_counts=True)
        for pair, number in zip(pairs.tolist(), runs.tolist(), strict=True):
            text_number, passage = divmod(pair, len(self._runs))
            if (share := number / int(self._runs[passage])) > SHARE:
                yield first + text_number, passage, share


def _ranges(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """range(left, right) of each pair, one after another."""
    lengths = right - left
    return np.arange(lengths.sum()) + np.repeat(left - np.cumsum(lengths) + lengths, lengths)
