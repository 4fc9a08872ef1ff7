"""Learn the merges of byte-pair encoding (BPE) from word counts: the same merges as subword-nmt's `learn_bpe`.

`symbols` holds the words as symbols. A pair is two symbols that are neighbours in a word.
"""

import gc
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from data.text.bpe import Merge
from data.text.symbols import BETWEEN, GONE, SymbolsOfWords

MIN_PAIR_COUNT = 2
RADIX = 2**31  # a pair is one number: the number of its first symbol times RADIX, plus that of its second
USE_NUMPY = 128  # entries from which numpy is faster than a loop
LevelEntry = tuple[str, str, int]  # the names of a pair's symbols, and the pair


def learn_merges(word_counts: Counter[str], merges: int) -> list[Merge]:
    """At most `merges` merges, in order. As in subword-nmt, learning stops where every pair occurs only once."""
    if not any(len(word) > 1 for word in word_counts):
        return []  # nothing to merge
    with _no_garbage_collection():
        pairs, learned = _Pairs(word_counts), []
        for index in range(merges):
            best, count = pairs.best(index)
            if count < MIN_PAIR_COUNT:
                break
            learned.append(pairs.merge(best))
            if index % 100 == 0:
                pairs.prune()
        return learned


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collection off inside the block.

    The learner creates no reference cycles, and collections would take a quarter of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Pairs:
    """How often each pair of neighbouring symbols occurs, kept up to date while pairs are merged.

    subword-nmt looks through all pairs at every merge to find the best. Here all pairs with the same count share a
    level, and a level is sorted when it is reached. A pair whose count has gone down by then moves to a lower level. A
    pair whose count goes up enters a higher level at once. Pairs below the threshold are in no level.

    The counts of subword-nmt are not quite exact, and its merges depend on them. So its bookkeeping is reproduced:
    which pairs it prunes and forgets, what it counts twice, and which words it skips.

    Memory: 63 bytes for each letter of the distinct words while the learner is set up (3.4 GB for 5 million words of 11
    letters), 40 bytes afterwards.
    """

    def __init__(self, word_counts: Counter[str]) -> None:
        self.words = words = SymbolsOfWords(word_counts)
        first = np.flatnonzero((words.symbols[:-1] != BETWEEN) & (words.symbols[1:] != BETWEEN)).astype(np.int32)
        pairs = words.symbols[first].astype(np.int64) * RADIX + words.symbols[first + 1]
        self.last_letter = len(words.names) - 1
        self.sorted_places = {self.last_letter: _sort(pairs, first)}
        """The later symbol of a pair -> what `_sort` returns for its pairs. Most pairs come up when the later of their
        two symbols is new, so their places are known together and sorted once."""
        self.unsorted_places: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.more_places: defaultdict[int, list[int]] = defaultdict(list)
        """pair -> places where it came up although neither symbol was new."""
        self.deviations: dict[int, dict[int, int]] = {}
        """pair -> word -> by how much subword-nmt's count of the pair in this word is too high."""
        keys, starts, places = self.sorted_places[self.last_letter]
        sums = np.add.reduceat(words.counts[places], starts[:-1]).tolist()
        self.counts: dict[int, int] = dict(zip(keys.tolist(), sums, strict=True))
        self.all_counts = dict(self.counts)  # including the pairs that are pruned from `counts`
        self.threshold = max(self.counts.values()) / 10
        self._fill_levels()

    def best(self, index: int) -> tuple[int, int]:
        """The pair that merge number `index` joins, and its count. Of equal counts, the pair that sorts last wins."""
        pair, count = self._top()
        if pair < 0 or (index and count < self.threshold):  # a pruned pair may be better
            self.prune()
            self.counts = dict(self.all_counts)
            self.threshold = max(self.counts.values()) * index / (index + 10_000)
            self.prune()
            self._fill_levels()
            pair, count = self._top()
        return pair, count

    def prune(self) -> None:
        """Move the pairs below the threshold from `counts` to `all_counts`."""
        threshold = self.threshold
        low = {pair: count for pair, count in self.counts.items() if count < threshold}
        for pair in low:
            del self.counts[pair]
        for pair in [pair for pair, count in low.items() if count < 0]:
            low[pair] += self.all_counts.get(pair, 0)
        self.all_counts |= low

    def merge(self, pair: int) -> Merge:
        """Join a pair wherever it occurs. Returns the names of its two symbols."""
        first, second = divmod(pair, RADIX)
        merge = self.words.names[first], self.words.names[second]
        is_new = "".join(merge) not in self.words.numbers
        joined, places = self.words.symbol("".join(merge)), self._places(pair)
        self.counts[pair] = 0
        by_word = places[:0]
        if not is_new or pair in self.deviations:
            by_word, places = places, by_word
        elif first == second and len(overlaps := places[np.isin(self.words.after[places], places)]):  # as in "aaa"
            is_by_word = np.isin(self.words.words_at(places), self.words.words_at(overlaps))
            by_word, places = places[is_by_word], places[~is_by_word]
        if len(places):
            self._merge_at(places, first, second, joined)
        if len(by_word) or pair in self.deviations:
            self._merge_by_word(by_word, pair, joined)
        self.counts[pair] = 0
        return merge

    def _places(self, pair: int) -> np.ndarray:
        """The places of the first symbol of every occurrence that a pair has now."""
        first, second = divmod(pair, RADIX)
        later = max(first, second, self.last_letter)
        if later in self.unsorted_places:
            self.sorted_places[later] = _sort(*self.unsorted_places.pop(later))
        places = np.zeros(0, np.int32)
        if later in self.sorted_places:
            keys, starts, all_places = self.sorted_places[later]
            at = int(keys.searchsorted(pair))
            if at < len(keys) and keys[at] == pair:
                places = all_places[starts[at] : starts[at + 1]]
        if pair in self.more_places:
            places = np.union1d(places, np.array(self.more_places.pop(pair), np.int32))
        symbols, after = self.words.symbols, self.words.after
        return places[(symbols.take(places) == first) & (symbols.take(after.take(places)) == second)]

    def _merge_at(self, places: np.ndarray, first: int, second: int, joined: int) -> None:
        """Join a pair at these places, all at once. `joined` is a symbol that no word holds yet."""
        symbols, before, after = self.words.symbols, self.words.before, self.words.after
        counts, gone = self.words.counts.take(places), after.take(places)
        left, right = before.take(places), after.take(gone)
        on_left, on_right = symbols.take(left).astype(np.int64), symbols.take(right).astype(np.int64)
        # Where the pair follows itself, the next occurrence subtracts the pair that stands between the two.
        takes = (on_right != BETWEEN) & ((on_right != first) | (symbols.take(after.take(right)) != second))
        inside = on_left != BETWEEN
        down = [(on_left * RADIX + first)[inside], (second * RADIX + on_right)[takes]]
        symbols[places], symbols[gone] = joined, GONE
        after[places], before[right] = right, places
        left = before.take(places)
        on_left, on_right = symbols.take(left).astype(np.int64), symbols.take(right).astype(np.int64)
        ends = (on_right != BETWEEN) & (on_right != joined)
        up = np.concatenate([(on_left * RADIX + joined)[inside], (joined * RADIX + on_right)[ends]])
        on_inside = counts[inside]
        self._add(np.concatenate([*down, up]), np.concatenate([-on_inside, -counts[takes], on_inside, counts[ends]]))
        self.unsorted_places[joined] = up, np.concatenate([left[inside], places[ends]])

    def _merge_by_word(self, places: np.ndarray, pair: int, joined: int) -> None:
        """Join a pair word by word, where subword-nmt's counts may differ from the true ones."""
        occurrences, believed = Counter(self.words.words_at(places).tolist()), self.deviations.pop(pair, {})
        for word in {**occurrences, **believed}:
            if occurrences[word] + believed.get(word, 0) < 1:  # subword-nmt skips the word
                self._deviate(pair, word, -occurrences[word])
            else:
                self._merge_in_word(word, occurrences[word], pair, joined)

    def _merge_in_word(self, word: int, occurrences: int, pair: int, joined: int) -> None:
        old_places = self.words.places(word)
        old = self.words.symbols[old_places].tolist()
        kept, new, matches = _join_in(old, pair, joined)
        new_places = [old_places[at] for at in kept]
        changes = _changes_of_subword_nmt(old, new, matches, pair, joined)
        self._replace(word, old_places, new_places, new)
        true = Counter(_pairs(new))
        true.subtract(_pairs(old))
        for each in {*changes, *true}:
            self._deviate(each, word, changes[each] - true[each] - (occurrences if each == pair else 0))
        count = int(self.words.counts[new_places[0]])
        self._add(np.array([*changes], np.int64), np.array([*changes.values()], np.int64) * count)
        for each, place, neighbours in zip(_pairs(new), new_places, pairwise(new), strict=False):
            if joined in neighbours:
                self.more_places[each].append(place)

    def _replace(self, word: int, old_places: list[int], new_places: list[int], new: list[int]) -> None:
        """Put new symbols into a word, at some of its old places."""
        words, linked = self.words, [int(self.words.ends[word]), *new_places, int(self.words.ends[word + 1])]
        words.symbols[old_places] = GONE
        words.symbols[new_places] = new
        words.after[linked[:-1]], words.before[linked[1:]] = linked[1:], linked[:-1]

    def _deviate(self, pair: int, word: int, by: int) -> None:
        """Add to a deviation of subword-nmt's count. A deviation that becomes 0 is removed."""
        if by:
            words = self.deviations.setdefault(pair, {})
            words[word] = words.get(word, 0) + by
            if not words[word]:
                del words[word]
            if not words:
                del self.deviations[pair]

    def _add(self, pairs: np.ndarray, changes: np.ndarray) -> None:
        """Change the counts of pairs. A pair may stand several times in `pairs`."""
        counts, get, threshold = self.counts, self.counts.get, self.threshold
        if len(pairs) > USE_NUMPY:
            pairs, index = np.unique(pairs, return_inverse=True)
            changes = np.bincount(index, changes).astype(np.int64)
        keys, changes = pairs.tolist(), changes.tolist()
        for pair, change in zip(keys, changes, strict=True):
            counts[pair] = get(pair, 0) + change
        for pair in {pair for pair, change in zip(keys, changes, strict=True) if change > 0}:
            if counts[pair] >= threshold:
                self._enter(pair)

    def _fill_levels(self) -> None:
        """Put every pair of `counts` into the level of its count."""
        self.levels: dict[int, list[int]] = {}
        self.sorted_levels: dict[int, list[LevelEntry]] = {}
        for pair, count in self.counts.items():
            self.levels.setdefault(count, []).append(pair)
        self.heights = [-count for count in self.levels]  # a heap, negative so that the highest comes first
        heapify(self.heights)

    def _enter(self, pair: int) -> None:
        """Put a pair into the level of its count."""
        count = self.counts[pair]
        if count in self.sorted_levels:
            insort(self.sorted_levels[count], self._entry(pair))
        elif count in self.levels:
            self.levels[count].append(pair)
        else:
            self.levels[count] = [pair]
            heappush(self.heights, -count)

    def _entry(self, pair: int) -> LevelEntry:
        first, second = divmod(pair, RADIX)
        return self.words.names[first], self.words.names[second], pair

    def _top(self) -> tuple[int, int]:
        """The best pair and its count, or (-1, 0) if no pair is left."""
        while self.heights:
            height = -self.heights[0]
            if height not in self.sorted_levels:
                self.sorted_levels[height] = sorted(map(self._entry, set(self.levels.pop(height))))
            level = self.sorted_levels[height]
            while level:
                pair = level[-1][2]
                count = self.counts.get(pair)
                if count == height:
                    return pair, height
                level.pop()
                if count is not None and self.threshold <= count < height:
                    self._enter(pair)
            del self.sorted_levels[height]
            heappop(self.heights)
        return -1, 0


def _sort(pairs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort places by the pair that stands there.

    Returns the distinct pairs in order, the index in the sorted places at which each pair starts (and the length of
    all), and the sorted places.
    """
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[starts], np.append(starts, len(pairs)), places[order]


def _join_in(old: list[int], pair: int, joined: int) -> tuple[list[int], list[int], list[int]]:
    """Join a pair in the symbols of a word, from left to right.

    Returns the indices in `old` that are kept, the new symbols, and the indices in `old` where the pair was joined.
    """
    first_and_second, kept, new, matches, at = list(divmod(pair, RADIX)), [], [], [], 0
    while at < len(old):
        is_pair = old[at : at + 2] == first_and_second
        if is_pair:
            matches.append(at)
        kept.append(at)
        new.append(joined if is_pair else old[at])
        at += 1 + is_pair
    return kept, new, matches


def _changes_of_subword_nmt(old: list[int], new: list[int], matches: list[int], pair: int, joined: int) -> Counter[int]:
    """By how much subword-nmt changes the count of each pair after joining `pair` in a word."""
    first, second = divmod(pair, RADIX)
    changes: Counter[int] = Counter()
    for at in matches:
        if at:
            changes[old[at - 1] * RADIX + first] -= 1
        if at + 2 < len(old) and old[at + 2 : at + 4] != [first, second]:
            changes[second * RADIX + old[at + 2]] -= 1
    for at, symbol in enumerate(new):
        if symbol == joined:
            for neighbour in range(max(at - 1, 0), min(at + 1, len(new) - 1)):
                if neighbour < at or new[at + 1] != joined:
                    changes[new[neighbour] * RADIX + new[neighbour + 1]] += 1
    return changes


def _pairs(symbols: list[int]) -> list[int]:
    return [first * RADIX + second for first, second in pairwise(symbols)]
