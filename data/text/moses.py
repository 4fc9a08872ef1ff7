"""Moses tokenization exactly as `transformers.BioGptTokenizer` calls sacremoses, of one text and of many in bulk.

Moses looks at one word between white space at a time. The tokens of a word depend on its neighbours in three cases:

- It ends in a full stop. Then the class of the next word's first character decides whether the sentence ends.
- It ends in an apostrophe. Then it matters whether the word is the last of the text.
- It begins with an apostrophe or a comma. Then it matters whether the word is the first of the text.

In a fourth case, two words share a space: one ends and the next begins with an apostrophe, and the rule for the first
consumes the space that the rule for the second needs.

So `take_apart` cuts texts into fragments. Most fragments are words. Where a neighbour matters, the fragment holds the
word and a stand-in for the neighbour: "vs.\\na" is "vs." before a lower-case letter. A text of the fourth case, or with
control characters (which Moses deletes), is one fragment as a whole. Equal fragments have equal tokens, so each
distinct fragment is tokenized only once.
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

pc: Any = pyarrow.compute  # pyright cannot see its functions: pyarrow creates them at run time
BEFORE = ("", "A\n")  # stand-ins for a neighbour in a fragment; words hold no line feed
AFTER = ("", "\na", "\n0", "\nA")
BATCH_BYTES = 16_000_000  # of text that is taken apart at once
FRAGMENTS_AT_ONCE = 10_000  # given to sacremoses as one text
SEPARATOR = "\ue000"  # neither letter nor digit: Moses makes it a token, and its neighbours are as beside a space
CONTROL = r"[\x00-\x08\x0e-\x1b]"
WHITE_SPACE = "[\t-\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # except the space itself
# Fragments that cannot be tokenized with others: Moses must see that they are first or last in their text, or they hold
# the separator or a control character.
ALONE = re.compile(rf"^,|['{SEPARATOR}]|{CONTROL}")
# Bits of what matters at the edges of a word
STOP, APOSTROPHE_LAST, APOSTROPHE_FIRST, COMMA_FIRST, LOWER_FIRST, DIGIT_FIRST, BLANK, JUNK = (1 << n for n in range(8))


class _Padding(dict[int, str]):
    """sacremoses' first rule, which puts spaces around many characters, as a table of the characters met so far."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self._pattern = pattern

    def __missing__(self, code: int) -> str:
        padded = self[code] = f" {chr(code)} " if self._pattern.match(chr(code)) else chr(code)
        return padded

    def sub(self, _: str, text: str) -> str:
        return text.translate(self)


class _Moses(MosesTokenizer):
    """sacremoses, several times as fast. Some rules have a cheaper form, and rules that cannot apply are left out.

    apostrophes: whether the text has any; if not, the rules for them are left out.
    """

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
        """sacremoses' method, called only for a token that ends in a full stop, with the next character."""
        tokens = text.split()
        for index, (token, following) in enumerate(pairwise([*tokens, "."])):
            if token[-1] == ".":
                tokens[index] = super().handles_nonbreaking_prefixes(f"{token} {following[0]}")[:-2]
        return " ".join(tokens)


@lru_cache
def _moses(apostrophes: bool) -> _Moses:
    return _Moses(apostrophes)


def _tokens(text: str) -> str:
    """The Moses tokens of a text, joined by spaces."""
    options = {"aggressive_dash_splits": True, "return_str": True, "escape": True}
    return _moses("'" in text).tokenize(text, **options)  # type: ignore[return-value]  # return_str makes it a string


def tokenize(text: str) -> list[str]:
    """The Moses tokens of a text: aggressive dash splits, escaped (`&`, `<`, `[` ... become `&amp;` ...).

    No token holds white space. Text that looks like a special token ("</s>") becomes several escaped tokens.
    """
    return _tokens(text).split()


def batches(texts: pa.Array) -> Iterator[pa.Array]:
    """Consecutive slices of an array of strings, of about BATCH_BYTES each and at least one string."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(), dtype=np.int64)
    start = done = 0
    while start < len(texts):
        stop = max(start + 1, int(np.searchsorted(ends, done + BATCH_BYTES, "right")))
        yield texts.slice(start, stop - start)
        start, done = stop, int(ends[stop - 1])


@dataclass(frozen=True)
class Fragments:
    """Texts that were taken apart."""

    distinct: list[str]
    """The fragments. A few are listed twice, and a few occur in no text."""
    codes: np.ndarray
    """The index in `distinct` of every fragment of all texts, in order; int32."""
    ends: np.ndarray
    """For every text the index in `codes` after its last fragment; int64."""


def take_apart(texts: pa.Array) -> Fragments:
    """Cut texts (strings without nulls) into fragments. No Python code runs for each word, only for distinct ones."""
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
    meeting = np.flatnonzero((edges[:-1] & APOSTROPHE_LAST > 0) & (edges[1:] & APOSTROPHE_FIRST > 0) & ~last[:-1])
    whole = np.unique(np.searchsorted(ends, np.append(junk, meeting), "right"))
    fragments = Fragments(distinct, codes, ends)
    return _with_whole_texts(texts, whole, fragments) if len(whole) else fragments


def _split(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Cut texts at spaces. Returns the words and, for each text, the index after its last word.

    The words are slices of the texts' own buffer, so nothing is copied. They still hold the spaces after them and all
    other white space, because a look at every word would be expensive. `take_apart` cleans each distinct word once.
    """
    texts = pc.utf8_trim(texts, " ")
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[: offsets[-1]]
    is_end = content == ord(" ")
    is_end[1:] &= content[:-1] != ord(" ")  # of several spaces the first ends the word; the others begin the next
    is_end[offsets[1:][np.diff(offsets) > 0] - 1] = True
    word_ends = np.flatnonzero(is_end) + 1
    word_offsets = np.append(offsets[:1], word_ends).astype(np.int32)
    words = pa.StringArray.from_buffers(len(word_ends), pa.py_buffer(word_offsets), texts.buffers()[2])
    return words, np.searchsorted(word_ends, offsets[1:], "right")


def _edges(words: pa.Array) -> np.ndarray:
    """For each word the bits of what its own and its neighbours' tokens depend on; uint8."""
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
    """Replace words whose tokens depend on a neighbour by fragments with a stand-in for it.

    The new fragments are appended to `distinct`, and `codes` is changed to point to them. edges, last: for each word in
    order its bits, and whether it is the last of its text.
    """
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


def _with_whole_texts(texts: pa.Array, whole: np.ndarray, fragments: Fragments) -> Fragments:
    """Replace the fragments of some texts by one fragment for each. whole: the indices of these texts."""
    starts, distinct, codes = np.append(0, fragments.ends[:-1]), fragments.distinct, fragments.codes
    keep = np.ones(len(codes), bool)
    for index, text in zip(whole.tolist(), texts.take(pa.array(whole)).to_pylist(), strict=True):
        keep[starts[index] + 1 : fragments.ends[index]] = False
        codes[starts[index]] = len(distinct)
        distinct.append(re.sub(r"\s+", " ", text))
    return Fragments(distinct, codes[keep], np.append(0, np.cumsum(keep))[fragments.ends])


def count_fragments(texts: pa.Array) -> Counter[str]:
    """How often each fragment occurs in texts (strings without nulls)."""
    fragments, counts = take_apart(texts), Counter()
    for fragment, count in zip(fragments.distinct, np.bincount(fragments.codes).tolist(), strict=False):
        counts[fragment] += count
    return +counts


def tokenize_fragments(fragments: list[str]) -> Iterator[list[str]]:
    """The Moses tokens of each fragment. sacremoses reads most fragments together, with SEPARATOR between them."""
    for start in range(0, len(fragments), FRAGMENTS_AT_ONCE):
        some = fragments[start : start + FRAGMENTS_AT_ONCE]
        alone = [ALONE.search(fragment) is not None for fragment in some]
        together = f" {SEPARATOR} ".join(each for each, by_itself in zip(some, alone, strict=True) if not by_itself)
        results = iter(_tokens(together).split(SEPARATOR))
        for fragment, by_itself in zip(some, alone, strict=True):
            tokens = (_tokens(fragment) if by_itself else next(results)).split()
            if "\n" in fragment:  # it has stand-ins for neighbours
                tokens = tokens[fragment.startswith(BEFORE[1]) : len(tokens) - fragment.endswith(AFTER[1:])]
            yield tokens
