"""Blocks of tokens -> blocks with something missing, which a model learns to write.

- `infill`: spans of whole words are each replaced by one mask, as BART's text infilling does it (Lewis et al. 2019,
  arXiv 1910.13461; fairseq's denoising_dataset.py).
- `fill_in_the_middle`: documents are rearranged, so that the middle follows what stands before and after it (Bavarian
  et al. 2022, arXiv 2207.14255).

Both treat each document of a block on its own, and leave the `</s>` behind it in its place. They are pure functions of
the tokens and of draws that follow from (seed, block number).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.common.files import read_json
from data.common.hashing import mix64
from data.text.bpe import END_OF_WORD
from data.text.ids import EOS_ID, UNK_ID


def draws_of(seed: int, number: int) -> np.random.RandomState:
    """The draws of a block. RandomState's stream is frozen; Generator's may change."""
    salt = int(mix64(np.array([number]), salt=seed)[0])
    return np.random.RandomState([salt % 2**32, salt // 2**32])


def word_ends(tokenizer: Path) -> np.ndarray:
    """Whether a token ends a word, (vocabulary,) bool. `<unk>` does: most unknown pieces are words of one character.

    Raises UserError if the folder's `vocab.json` is missing or damaged.
    """
    vocabulary: dict[str, int] = read_json(tokenizer / "vocab.json")
    ends = np.zeros(len(vocabulary), bool)
    ends[[UNK_ID, *(index for token, index in vocabulary.items() if token.endswith(END_OF_WORD))]] = True
    return ends


def infill(
    tokens: np.ndarray, ends: np.ndarray, mask_id: int, share: float, span_length: float, draws: np.random.RandomState
) -> np.ndarray:
    """The tokens with masks in the place of spans of words. There are never more of them than before.

    tokens: (T,) of a block; ends: as `word_ends`; share: of the words of each document that are masked, rounded at
    random; span_length: mean number of words of a span, which are drawn by Poisson. A span of no word inserts a mask.
    """
    parts = []
    for text, end in _documents(tokens):
        edges = _edges(text, ends)
        spans = draw_spans(len(edges) - 1, share, span_length, draws)
        begun = 0
        for first, last in edges[spans].tolist():
            parts += [text[begun:first], [mask_id]]
            begun = last
        parts += [text[begun:], end]
    return np.concatenate(parts).astype(tokens.dtype)


def draw_spans(words: int, share: float, span_length: float, draws: np.random.RandomState) -> np.ndarray:
    """The first and the last word (exclusive) of spans in a text of so many words, (spans, 2), from left to right.

    Spans do not overlap. All arrangements of these spans among the words that are kept are equally likely.
    """
    masked = int(share * words + draws.random_sample())
    if not masked:
        return np.zeros((0, 2), np.int64)
    stops = np.minimum(np.cumsum(draws.poisson(span_length, masked)), masked)
    stops[-1] = masked  # so many spans at most
    lengths = np.diff(stops[: np.searchsorted(stops, masked) + 1], prepend=0)
    taken = np.ones(words - masked + len(lengths), np.int64)  # words of each item: a kept word or a span
    items = draws.permutation(len(taken))[: len(lengths)]
    taken[items] = lengths
    lasts = np.cumsum(taken)
    items.sort()
    return np.stack([lasts[items] - taken[items], lasts[items]], 1)


def fill_in_the_middle(
    tokens: np.ndarray, ends: np.ndarray, sentinels: tuple[int, int, int], rate: float, draws: np.random.RandomState
) -> np.ndarray:
    """The tokens with some documents as prefix, suffix, middle, cut back to the length that they had.

    tokens, ends: as for `infill`; sentinels: the ids before prefix, suffix and middle; rate: probability that a
    document is rearranged. It is cut at two of the places between its words, both ends included, which are drawn
    evenly. The paper cuts anywhere in a word, because code is completed there. Our tokens would not fit that: a text
    that is tokenized alone always ends in a whole word.
    """
    parts = []
    for text, end in _documents(tokens):
        if len(text) and draws.random_sample() < rate:
            edges = _edges(text, ends)
            first, last = np.sort(edges[draws.randint(len(edges), size=2)])
            before, after, middle = ([sentinel] for sentinel in sentinels)
            parts += [before, text[:first], after, text[last:], middle, text[first:last], end]
        else:
            parts += [text, end]
    return np.concatenate(parts).astype(tokens.dtype)[: len(tokens)]


def _documents(tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The text of each document of a block, and the `</s>` behind it or nothing."""
    for document in np.split(tokens, np.flatnonzero(tokens == EOS_ID) + 1):
        length = len(document) - np.count_nonzero(document[-1:] == EOS_ID)
        yield document[:length], document[length:]


def _edges(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where the words of a text begin, and where the last one ends. A block may cut its first and last word."""
    return np.unique(np.concatenate([[0], np.flatnonzero(ends[text]) + 1, [len(text)]]))
