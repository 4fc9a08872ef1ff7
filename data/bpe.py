"""Byte-pair encoding as subword-nmt does it: learn merges from word counts, apply them to a word.

Tokens are written as transformers' BioGptTokenizer writes them: the last piece of a word ends in `</w>`, the others
stand bare. (fastBPE and fairseq write `tok` for `tok</w>` and `tok@@` for `tok`.)
"""

import sys
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise

END_OF_WORD = "</w>"
MIN_PAIR_COUNT = 2
Merge = tuple[str, str]
Entry = tuple[int, str, str, Merge]  # of a heap: minus the count, then keys that put the last pair first


def learn_merges(word_counts: Counter[str], merges: int) -> list[Merge]:
    """At most `merges` merges, in order: those of subword-nmt's `learn_bpe`, with its stop at pairs seen once."""
    if not any(len(word) > 1 for word in word_counts):
        return []  # nothing to merge
    pairs, learned = _PairCounts(word_counts), []
    for index in range(merges):
        best, count = pairs.best(index)
        if count < MIN_PAIR_COUNT:
            break
        learned.append(best)
        pairs.merge(best)
        if index % 100 == 0:
            pairs.prune()
    return learned


class _PairCounts:
    """How often each pair of neighbouring symbols occurs, kept up to date word by word as pairs are merged.

    subword-nmt looks through all pairs for the best at every merge; here a heap gives it: an entry whose count has
    gone down since is found out when it comes to the top, one whose count has gone up is entered anew. All else is
    done as there, for its counts are not quite exact, and merges depend on them: what it prunes and forgets, what it
    counts twice (a symbol that two paths lead to), which words it skips.
    """

    def __init__(self, word_counts: Counter[str]) -> None:
        self.words = [[*word[:-1], word[-1] + END_OF_WORD] for word in word_counts]
        self.word_counts = list(word_counts.values())
        self.counts: dict[Merge, int] = {}
        self.places: dict[Merge, dict[int, int]] = {}  # pair -> word -> how often it occurs there
        self.keys: dict[str, str] = {}
        for index, (symbols, count) in enumerate(zip(self.words, self.word_counts, strict=True)):
            for pair in pairwise(symbols):
                self._add(pair, index, count, 1)
        self.all_counts: defaultdict[Merge, int] = defaultdict(int, self.counts)  # those pruned from `counts` too
        self.threshold = max(self.counts.values()) / 10
        self._fill_heap()

    def best(self, index: int) -> tuple[Merge, int]:
        """The pair that merge number `index` is to join, and its count: of equal counts, the pair that sorts last."""
        entry = self._top()
        if not entry or (index and -entry[0] < self.threshold):  # a pruned pair may be better
            self.prune()
            self.counts = dict(self.all_counts)
            self.threshold = max(self.counts.values()) * index / (index + 10_000)
            self.prune()
            self._fill_heap()
            entry = self._top()
        return (entry[3], -entry[0]) if entry else (("", ""), 0)

    def prune(self) -> None:
        """Put the pairs below the threshold aside."""
        for pair in [pair for pair, count in self.counts.items() if count < self.threshold]:
            count = self.counts.pop(pair)
            self.all_counts[pair] = count + (self.all_counts[pair] if count < 0 else 0)

    def merge(self, pair: Merge) -> None:
        """Join a pair wherever it occurs."""
        (first, second), joined, risen = pair, "".join(pair), set()
        words, add = self.words, self._add
        places, self.places[pair], self.counts[pair] = self.places[pair], {}, 0
        for index, occurrences in places.items():
            if occurrences < 1:
                continue
            old, count, start = words[index], self.word_counts[index], 0
            new = old.copy()
            last, removed = len(old) - 1, 0
            while first in old[start:last]:
                at = old.index(first, start)
                if old[at + 1] != second:
                    start = at + 1
                    continue
                if at:
                    add((old[at - 1], first), index, -count, -1)
                # Where the pair follows itself, the next occurrence takes away what stands between the two.
                if at + 1 < last and (old[at + 2] != first or at + 2 >= last or old[at + 3] != second):
                    add((second, old[at + 2]), index, -count, -1)
                new[at - removed : at - removed + 2] = [joined]
                start, removed = at + 2, removed + 1
            words[index] = new
            for at, symbol in enumerate(new):
                if symbol == joined:
                    neighbours = [(new[at - 1], joined)] if at else []
                    if at + 1 < len(new) and new[at + 1] != joined:
                        neighbours.append((joined, new[at + 1]))
                    for neighbour in neighbours:
                        add(neighbour, index, count, 1)
                        risen.add(neighbour)
        self.counts[pair] = 0
        for each in risen:
            heappush(self.heap, self._entry(each))

    def _add(self, pair: Merge, index: int, count: int, occurrences: int) -> None:
        self.counts[pair] = self.counts.get(pair, 0) + count
        places = self.places.setdefault(pair, {})
        places[index] = places.get(index, 0) + occurrences

    def _entry(self, pair: Merge) -> Entry:
        return -self.counts[pair], self._key(pair[0]), self._key(pair[1]), pair

    def _key(self, symbol: str) -> str:
        """A string that sorts the other way round."""
        if symbol not in self.keys:
            self.keys[symbol] = "".join(chr(sys.maxunicode - ord(letter)) for letter in symbol) + chr(sys.maxunicode)
        return self.keys[symbol]

    def _fill_heap(self) -> None:
        self.heap = [self._entry(pair) for pair in self.counts]
        heapify(self.heap)

    def _top(self) -> Entry | None:
        """The best entry, after those that are out of date have been put right."""
        while self.heap:
            entry = self.heap[0]
            count = self.counts.get(entry[3])
            if count == -entry[0]:
                return entry
            if count is None:
                heappop(self.heap)
            else:
                heapreplace(self.heap, self._entry(entry[3]))
        return None


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
