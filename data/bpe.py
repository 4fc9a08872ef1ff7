"""Byte-pair encoding as subword-nmt does it: learn merges from word counts, apply them to a word.

Tokens are written as transformers' BioGptTokenizer writes them: the last piece of a word ends in `</w>`, the others
stand bare. (fastBPE and fairseq write `tok` for `tok</w>` and `tok@@` for `tok`.)
"""

import contextlib
import io
import os
import sys
from collections import Counter
from itertools import pairwise

from subword_nmt.learn_bpe import learn_bpe

END_OF_WORD = "</w>"
Merge = tuple[str, str]


def learn_merges(word_counts: Counter[str], merges: int) -> list[Merge]:
    """At most `merges` merges, in order: subword-nmt's `learn_bpe` with its stop at pairs seen once.

    Words are given to it in sorted order, so that the result depends on the counts alone.
    """
    lines = [f"{word} {count}" for word, count in sorted(word_counts.items())]
    if not any(len(word) > 1 for word in word_counts):
        return []  # nothing to merge; learn_bpe would fail on it
    learned = io.StringIO()
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():  # its progress bar belongs on a terminal only
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))  # noqa: PTH123
        learn_bpe(lines, learned, merges, is_dict=True)
    _, *rules = learned.getvalue().splitlines()  # the first line is "#version: 0.2"
    pairs = [rule.split(" ") for rule in rules]
    return [(first, second) for first, second in pairs]


class Segmenter:
    """Cuts words into BPE tokens."""

    def __init__(self, merges: list[Merge]) -> None:
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}

    def __call__(self, word: str) -> list[str]:
        """The tokens of one Moses token, as subword-nmt's `encode` (version 0.2) gives them, in half its time.

        All occurrences of the best pair are merged, from left to right, before the next pair is looked for.
        """
        never, rank_of = len(self._ranks), self._ranks.get
        symbols = [*word[:-1], word[-1] + END_OF_WORD]
        ranks = [*(rank_of(pair, never) for pair in pairwise(symbols)), never]  # of each symbol and the next
        while (best := min(ranks)) < never:
            while best in ranks:
                at = ranks.index(best)
                symbols[at] += symbols.pop(at + 1)
                del ranks[at]
                if at > 0:
                    ranks[at - 1] = rank_of((symbols[at - 1], symbols[at]), never)
                if at + 1 < len(symbols):
                    ranks[at] = rank_of((symbols[at], symbols[at + 1]), never)
        return symbols
