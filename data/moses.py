"""Moses tokenization, exactly as `transformers.BioGptTokenizer` calls sacremoses: of a text, and of many in bulk.

Moses looks at one white-space separated word at a time, but for its edges. What a word's tokens are depends on

- the class of the next word's first character, where it ends in a full stop (is it the end of a sentence?),
- whether it is the last of the text, where it ends in an apostrophe,
- whether it is the first of the text, where it begins with an apostrophe or a comma;

and where a word ends and the next begins with an apostrophe, Moses lets the first take the space from the second. So
`take_apart` cuts texts into pieces: words, with a neighbour where it matters ("vs.\\na" is "vs." before a lower-case
letter), or a whole text where apostrophes meet. Equal pieces have equal tokens, so each need be tokenized once only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from sacremoses import MosesTokenizer

pc: Any = pyarrow.compute  # its functions are made at run time: pyright knows them not
BEFORE = ("", "A\n")  # neighbours that a piece may have: words have no line feed
AFTER = ("", "\na", "\n0", "\nA")
BATCH_BYTES = 8_000_000  # of text, that are worked on together
PIECES_TOGETHER = 10_000
SEPARATOR = "\ue000"  # neither letter nor digit: it stands apart, and what is beside it is as beside a space
JUNK = r"[\x00-\x08\x0e-\x1b]"  # control characters, which Moses deletes; the others are white space
STOP, APOSTROPHE_LAST, APOSTROPHE_FIRST, COMMA_FIRST, LOWER_FIRST, DIGIT_FIRST = (1 << bit for bit in range(6))


class _Moses(MosesTokenizer):
    """sacremoses, several times as fast: no set of characters is made anew, no rule is tried that cannot apply."""

    def __init__(self, apostrophes: bool) -> None:
        super().__init__(lang="en")
        self._lower, self._alpha = frozenset(self.IsLower), frozenset(self.IsAlpha)
        if not apostrophes:
            self.ENGLISH_SPECIFIC_APOSTROPHE = []

    def islower(self, text: str) -> bool:
        return self._lower.issuperset(text)

    def isanyalpha(self, text: str) -> bool:
        return not self._alpha.isdisjoint(text)

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        """What sacremoses does, for each token that ends in a full stop and the first character of the next."""
        tokens = text.split()
        for index, (token, following) in enumerate(pairwise([*tokens, "."])):
            if token[-1] == ".":
                tokens[index] = super().handles_nonbreaking_prefixes(f"{token} {following[0]}")[:-2]
        return " ".join(tokens)


@lru_cache
def _moses(apostrophes: bool) -> _Moses:
    return _Moses(apostrophes)


def _tokens(text: str) -> str:
    """The Moses tokens of a text, with spaces between."""
    options = {"aggressive_dash_splits": True, "return_str": True, "escape": True}
    return _moses("'" in text).tokenize(text, **options)  # type: ignore[return-value]  # a string with return_str


def tokenize(text: str) -> list[str]:
    """The Moses tokens of a text: aggressive dash splits, escaped (`&`, `<`, `[` ... become `&amp;` ...).

    No token holds white space. Text that looks like a special token ("</s>") comes out as plain escaped pieces.
    """
    return _tokens(text).split()


def batches(texts: pa.Array) -> Iterator[pa.Array]:
    """Consecutive slices of an array of strings, of some BATCH_BYTES each."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(), dtype=np.int64)
    start = done = 0
    while start < len(texts):
        stop = max(start + 1, int(np.searchsorted(ends, done + BATCH_BYTES, "right")))
        yield texts.slice(start, stop - start)
        start, done = stop, int(ends[stop - 1])


@dataclass(frozen=True)
class Pieces:
    """Texts, taken apart."""

    distinct: list[str]
    """Each piece once, and some words that stand nowhere without a neighbour."""
    codes: np.ndarray
    """Of every piece of all texts in order, its index in `distinct`; int32."""
    ends: np.ndarray
    """Of every text, the index in `codes` after its last piece; int64."""


def take_apart(texts: pa.Array) -> Pieces:
    """The pieces of texts (strings without nulls). No Python runs per word."""
    clean = texts
    if pc.any(pc.match_substring_regex(texts, JUNK)).as_py():
        clean = pc.replace_substring_regex(texts, JUNK, "")
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(clean))  # at what is white space to Python, a test finds
    ends = words.offsets.to_numpy()[1:].astype(np.int64)
    encoded = words.values.dictionary_encode()
    codes, distinct = encoded.indices.to_numpy().copy(), encoded.dictionary.to_pylist()
    edges = _edges(encoded.dictionary)[codes]
    last = np.zeros(len(codes), bool)
    last[ends - 1] = True  # every text has a word, if an empty one
    _add_neighbours(codes, distinct, edges, last)
    met = np.flatnonzero((edges[:-1] & APOSTROPHE_LAST > 0) & (edges[1:] & APOSTROPHE_FIRST > 0) & ~last[:-1])
    if len(met):
        return _with_whole_texts(texts, np.unique(np.searchsorted(ends, met, "right")), Pieces(distinct, codes, ends))
    return Pieces(distinct, codes, ends)


def _edges(words: pa.Array) -> np.ndarray:
    """Of each word, as bits, what matters of its first and last character; uint8."""
    first = pc.utf8_slice_codeunits(words, 0, 1)
    edges = np.zeros(len(words), np.uint8)
    for bit, mask in (
        (STOP, pc.ends_with(words, ".")),
        (APOSTROPHE_LAST, pc.ends_with(words, "'")),
        (APOSTROPHE_FIRST, pc.equal(first, "'")),
        (COMMA_FIRST, pc.equal(first, ",")),
        (LOWER_FIRST, pc.is_in(first, pa.array(sorted(MosesTokenizer.IsLower)))),
        (DIGIT_FIRST, pc.is_in(first, pa.array(list("0123456789")))),
    ):
        edges[mask.to_numpy(False)] |= bit
    return edges


def _add_neighbours(codes: np.ndarray, distinct: list[str], edges: np.ndarray, last: np.ndarray) -> None:
    """Give the words whose tokens depend on a neighbour their codes: of pieces that have one, new in `distinct`."""
    rows = np.flatnonzero(edges & (STOP | APOSTROPHE_LAST | APOSTROPHE_FIRST | COMMA_FIRST))
    edge, has_next, has_previous = edges[rows], ~last[rows], rows > 0
    has_previous[has_previous] = ~last[rows[has_previous] - 1]
    following = np.where(has_next, edges[np.minimum(rows + 1, len(edges) - 1)], 0)
    after = np.select(
        [
            (edge & STOP > 0) & (following & LOWER_FIRST > 0),
            (edge & STOP > 0) & (following & DIGIT_FIRST > 0),
            (edge & APOSTROPHE_LAST > 0) & has_next,
        ],
        [1, 2, 3],
        0,
    )
    before = (edge & (APOSTROPHE_FIRST | COMMA_FIRST) > 0) & has_previous
    context = len(AFTER) * before + after
    rows, context = rows[context > 0], context[context > 0]
    pairs, index = np.unique(codes[rows].astype(np.int64) * 8 + context, return_inverse=True)
    codes[rows] = len(distinct) + index
    for word, here in zip((pairs // 8).tolist(), (pairs % 8).tolist(), strict=True):
        distinct.append(BEFORE[here // len(AFTER)] + distinct[word] + AFTER[here % len(AFTER)])


def _with_whole_texts(texts: pa.Array, whole: np.ndarray, pieces: Pieces) -> Pieces:
    """The pieces, with one instead of many for each of the texts `whole`."""
    starts = np.append(0, pieces.ends[:-1])
    keep = np.ones(len(pieces.codes), bool)
    for index, text in zip(whole.tolist(), texts.take(pa.array(whole)).to_pylist(), strict=True):
        keep[starts[index] + 1 : pieces.ends[index]] = False
        pieces.codes[starts[index]] = len(pieces.distinct)
        pieces.distinct.append(re.sub(r"\s+", " ", text))
    return Pieces(pieces.distinct, pieces.codes[keep], np.cumsum(keep)[pieces.ends - 1])


def count_pieces(texts: pa.Array) -> dict[str, int]:
    """How often each piece of texts occurs."""
    pieces = take_apart(texts)
    counts = np.bincount(pieces.codes, minlength=len(pieces.distinct)).tolist()
    return {piece: count for piece, count in zip(pieces.distinct, counts, strict=True) if count}


def tokenize_pieces(pieces: list[str]) -> Iterator[list[str]]:
    """The tokens of each piece: sacremoses reads nearly all of them together, with SEPARATOR between."""
    for start in range(0, len(pieces), PIECES_TOGETHER):
        some = pieces[start : start + PIECES_TOGETHER]
        together = [piece for piece in some if not _stands_alone(piece)]
        results = iter(_tokens(f" {SEPARATOR} ".join(together)).split(SEPARATOR))
        for piece in some:
            tokens = (_tokens(piece) if _stands_alone(piece) else next(results)).split()
            yield tokens[piece.startswith(BEFORE[1]) : len(tokens) - (piece[-2:] in AFTER[1:])]


def _stands_alone(piece: str) -> bool:
    """Whether Moses must see that it is first or last; or it holds what would separate it from others."""
    return "'" in piece or piece[:1] == "," or SEPARATOR in piece
