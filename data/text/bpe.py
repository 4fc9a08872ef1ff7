"""Apply byte-pair encoding (BPE) to a word, as subword-nmt does it. `learn_bpe` learns the merges.

Tokens are written as transformers' BioGptTokenizer writes them: the last token of a word ends in `</w>`, and the others
have no mark. fastBPE and fairseq write `tok` for our `tok</w>`, and `tok@@` for our `tok`.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

END_OF_WORD = "</w>"
LONG = 200
"""Longer words are segmented with a heap: its time grows with their number of letters, not with its square."""
Merge = tuple[str, str]


class Segmenter:
    """Cuts words into BPE tokens."""

    def __init__(self, merges: list[Merge]) -> None:
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}

    def __call__(self, word: str) -> list[str]:
        """The BPE tokens of one Moses token: those of subword-nmt's `encode` (version 0.2), in half its time.

        All occurrences of the best pair are merged, from left to right, before the next pair is looked for.
        """
        symbols = [*word[:-1], word[-1] + END_OF_WORD]
        if len(symbols) > LONG:
            return list(_LongWord(symbols, self._ranks))
        no_merge, rank_of = len(self._ranks), self._ranks.get
        # ranks[i] is the rank of the pair of symbols i and i + 1.
        ranks = [*(rank_of(pair, no_merge) for pair in pairwise(symbols)), no_merge]
        while (best := min(ranks)) < no_merge:
            while best in ranks:
                at = ranks.index(best)
                symbols[at] += symbols.pop(at + 1)
                del ranks[at]
                if at > 0:
                    ranks[at - 1] = rank_of((symbols[at - 1], symbols[at]), no_merge)
                if at + 1 < len(symbols):
                    ranks[at] = rank_of((symbols[at], symbols[at + 1]), no_merge)
        return symbols


class _LongWord:
    """Segments one long word. Iterating gives its tokens.

    Symbols that are left are linked. The places of the pairs that can be merged are kept by their rank.
    """

    def __init__(self, symbols: list[str], ranks: dict[Merge, int]) -> None:
        self._symbols, self._ranks = symbols, ranks
        self._next = list(range(1, len(symbols) + 1))
        self._previous = list(range(-1, len(symbols) - 1))
        self._places: dict[int, list[int]] = {}
        for place, pair in enumerate(pairwise(symbols)):
            if (rank := ranks.get(pair)) is not None:
                self._places.setdefault(rank, []).append(place)
        self._waiting = list(self._places)  # a heap of ranks
        heapify(self._waiting)

    def __iter__(self) -> Iterator[str]:
        while self._waiting:
            rank = heappop(self._waiting)
            merged = [place for place in sorted(self._places.pop(rank)) if self._merge(place, rank)]
            for place in merged:  # only now: a new pair of a lower rank waits until all of this rank are merged
                self._enter(self._previous[place])
                self._enter(place)
        place = 0
        while place < len(self._symbols):
            yield self._symbols[place]
            place = self._next[place]

    def _merge(self, place: int, rank: int) -> bool:
        """Merge the symbol at a place with the next, unless the two are no longer the pair of this rank."""
        symbols, following = self._symbols, self._next[place]
        if following >= len(symbols) or self._ranks.get((symbols[place], symbols[following])) != rank:
            return False
        symbols[place] += symbols[following]
        symbols[following] = ""  # no pair holds an empty symbol
        self._next[place] = after = self._next[following]
        if after < len(symbols):
            self._previous[after] = place
        return True

    def _enter(self, place: int) -> None:
        """Note the pair that begins at a place, if it can be merged."""
        if place < 0 or self._next[place] >= len(self._symbols):
            return
        rank = self._ranks.get((self._symbols[place], self._symbols[self._next[place]]))
        if rank is None:
            return
        if rank not in self._places:
            self._places[rank] = []
            heappush(self._waiting, rank)
        self._places[rank].append(place)
