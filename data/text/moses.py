"""Moses tokenization, exactly as `transformers.BioGptTokenizer` calls sacremoses: of a text, and of many in bulk.

Moses looks at one white-space separated word at a time, but for its edges. What a word's tokens are depends on

- the class of the next word's first character, where it ends in a full stop (is it the end of a sentence?),
- whether it is the last of the text, where it ends in an apostrophe,
- whether it is the first of the text, where it begins with an apostrophe or a comma;

and where a word ends and the next begins with an apostrophe, Moses lets the first take the space from the second. So
`take_apart` cuts texts into pieces: words, with a neighbour where it matters ("vs.\\na" is "vs." before a lower-case
letter). A text in which apostrophes meet so, or which has control characters (Moses deletes them), is a piece as a
whole. Equal pieces have equal tokens, so each need be tokenized once only.
"""

import re
from collections import Counter
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
BATCH_BYTES = 16_000_000  # of text, that are worked on together
PIECES_TOGETHER = 10_000
SEPARATOR = "\ue000"  # neither letter nor digit: it stands apart, and what is beside it is as beside a space
CONTROL = r"[\x00-\x08\x0e-\x1b]"
WHITE_SPACE = "[\t-\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # but for the space itself
# Moses must see that such a piece is first or last in its text, or it holds what would separate it from others.
ALONE = re.compile(rf"^,|['{SEPARATOR}]|{CONTROL}")
STOP, APOSTROPHE_LAST, APOSTROPHE_FIRST, COMMA_FIRST, LOWER_FIRST, DIGIT_FIRST, BLANK, JUNK = (1 << n for n in range(8))


class _Padding(dict[int, str]):
    """sacremoses' first rule, space around each of many characters, as a table that grows with the characters met."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self._pattern = pattern

    def __missing__(self, code: int) -> str:
        padded = self[code] = f" {chr(code)} " if self._pattern.match(chr(code)) else chr(code)
        return padded

    def sub(self, _: str, text: str) -> str:
        return text.translate(self)


class _Moses(MosesTokenizer):
    """sacremoses, several times as fast: rules are said in a cheaper way, none is tried that cannot apply."""

    def __init__(self, apostrophes: bool) -> None:
        super().__init__(lang="en")
        self._lower, self._alpha = frozenset(self.IsLower), frozenset(self.IsAlpha)
        self.PAD_NOT_ISALNUM = _Padding(MosesTokenizer.PAD_NOT_ISALNUM[0]), ""
        self.AGGRESSIVE_HYPHEN_SPLIT = re.compile(f"-(?<=[{self.IsAlnum}]-)(?=[{self.IsAlnum}])"), " @-@ "
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
    """The pieces: most stand here once, some twice, and some that no text has."""
    codes: np.ndarray
    """Of every piece of all texts in order, its index in `distinct`; int32."""
    ends: np.ndarray
    """Of every text, the index in `codes` after its last piece; int64."""


def take_apart(texts: pa.Array) -> Pieces:
    """The pieces of texts (strings without nulls). No Python runs per word."""
    words, ends = _split(texts)
    encoded = words.dictionary_encode()
    vocabulary = pc.utf8_trim(pc.replace_substring_regex(encoded.dictionary, WHITE_SPACE, " "), " ")
    codes, distinct = encoded.indices.to_numpy(), vocabulary.to_pylist()
    edges = _edges(vocabulary)[codes]
    blank = np.flatnonzero(edges & BLANK)
    codes, edges, ends = np.delete(codes, blank), np.delete(edges, blank), ends - np.searchsorted(blank, ends)
    last = np.zeros(len(codes), bool)
    last[ends[ends > 0] - 1] = True
    _add_neighbours(codes, distinct, edges, last)
    junk = np.flatnonzero(edges & JUNK)
    met = np.flatnonzero((edges[:-1] & APOSTROPHE_LAST > 0) & (edges[1:] & APOSTROPHE_FIRST > 0) & ~last[:-1])
    whole = np.unique(np.searchsorted(ends, np.append(junk, met), "right"))
    pieces = Pieces(distinct, codes, ends)
    return _with_whole_texts(texts, whole, pieces) if len(whole) else pieces


def _split(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """What stands between spaces in texts, with some of the spaces, and for each text the index after its last.

    All are slices of one buffer: none is copied. Other white space than the space is left in them, for here is what
    costs: words are looked at when each stands once.
    """
    texts = pc.utf8_trim(texts, " ")
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[: offsets[-1]]
    is_end = content == ord(" ")
    is_end[1:] &= content[:-1] != ord(" ")  # further spaces go with the next word
    is_end[offsets[1:][np.diff(offsets) > 0] - 1] = True
    word_ends = np.flatnonzero(is_end) + 1
    word_offsets = np.append(offsets[:1], word_ends).astype(np.int32)
    words = pa.StringArray.from_buffers(len(word_ends), pa.py_buffer(word_offsets), texts.buffers()[2])
    return words, np.searchsorted(word_ends, offsets[1:], "right")


def _edges(words: pa.Array) -> np.ndarray:
    """Of each word, as bits, what its and its neighbours' tokens depend on; uint8."""
    first = pc.utf8_slice_codeunits(words, 0, 1)
    edges = np.zeros(len(words), np.uint8)
    for bit, mask in (
        (STOP, pc.ends_with(words, ".")),
        (APOSTROPHE_LAST, pc.ends_with(words, "'")),
        (APOSTROPHE_FIRST, pc.equal(first, "'")),
        (COMMA_FIRST, pc.equal(first, ",")),
        (LOWER_FIRST, pc.is_in(first, pa.array(sorted(MosesTokenizer.IsLower)))),
        (DIGIT_FIRST, pc.is_in(first, pa.array(list("0123456789")))),
        (BLANK, pc.equal(words, "")),
        (JUNK, pc.match_substring_regex(words, CONTROL)),
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
    return Pieces(pieces.distinct, pieces.codes[keep], np.append(0, np.cumsum(keep))[pieces.ends])


def count_pieces(texts: pa.Array) -> Counter[str]:
    """How often each piece of texts occurs."""
    pieces, counts = take_apart(texts), Counter()
    for piece, count in zip(pieces.distinct, np.bincount(pieces.codes).tolist(), strict=False):
        counts[piece] += count
    return +counts


def tokenize_pieces(pieces: list[str]) -> Iterator[list[str]]:
    """The tokens of each piece: sacremoses reads nearly all of them together, with SEPARATOR between."""
    for start in range(0, len(pieces), PIECES_TOGETHER):
        some = pieces[start : start + PIECES_TOGETHER]
        alone = [ALONE.search(piece) is not None for piece in some]
        together = f" {SEPARATOR} ".join(piece for piece, by_itself in zip(some, alone, strict=True) if not by_itself)
        results = iter(_tokens(together).split(SEPARATOR))
        for piece, by_itself in zip(some, alone, strict=True):
            tokens = (_tokens(piece) if by_itself else next(results)).split()
            if "\n" in piece:  # it has neighbours
                tokens = tokens[piece.startswith(BEFORE[1]) : len(tokens) - piece.endswith(AFTER[1:])]
            yield tokens
