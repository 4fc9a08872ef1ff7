"""Byte-pair encoding as subword-nmt does it: learn merges from word counts, apply them to a word.

Tokens are written as transformers' BioGptTokenizer writes them: the last piece of a word ends in `</w>`, the others
stand bare. (fastBPE and fairseq write `tok` for `tok</w>` and `tok@@` for `tok`.)
"""

import gc
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

END_OF_WORD = "</w>"
MIN_PAIR_COUNT = 2
RADIX = 2**31  # a pair is one number: its first symbol's times this, plus its second's
LAST = 2**21  # what the code of a word's last letter is raised by
BETWEEN, GONE = -1, -2  # in place of a symbol: between words; joined to the one before
MANY = 128  # from so many on numpy is worth its calls
Merge = tuple[str, str]
Entry = tuple[str, str, int]


def learn_merges(word_counts: Counter[str], merges: int) -> list[Merge]:
    """At most `merges` merges, in order: those of subword-nmt's `learn_bpe`, with its stop at pairs seen once."""
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
    """Nothing here makes cycles, and collections that look through all that was imported take a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Words:
    """The words as one array of symbol numbers, BETWEEN around each; `before` and `after` link those that are left."""

    def __init__(self, word_counts: Counter[str]) -> None:
        lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
        self.ends = np.append(0, np.cumsum(lengths + 1))  # where BETWEEN stands
        inside = np.ones(self.ends[-1] + 1, bool)
        inside[self.ends] = False
        codes = np.zeros(len(inside), np.int32)
        codes[inside] = np.frombuffer("".join(word_counts).encode("utf-32-le", "surrogatepass"), np.int32) + 1
        codes[self.ends[1:] - 1] += LAST
        number_of = np.zeros(2 * LAST, np.int32)
        number_of[codes] = 1
        letters = np.flatnonzero(number_of)
        number_of[letters] = np.arange(len(letters)) + BETWEEN
        self.symbols = number_of[codes]
        self.names = [chr(code % LAST - 1) + END_OF_WORD * (code >= LAST) for code in letters[1:].tolist()]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.counts = np.zeros(len(codes), np.int64)  # of each symbol's word
        self.counts[inside] = np.repeat(np.fromiter(word_counts.values(), np.int64, len(word_counts)), lengths)
        places = np.arange(len(codes), dtype=np.int32)
        self.before, self.after = places - 1, np.minimum(places + 1, len(codes) - 1, dtype=np.int32)

    def symbol(self, name: str) -> int:
        """The number of a symbol, a new one for a new name."""
        number = self.numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def of(self, places: np.ndarray) -> np.ndarray:
        """The numbers of the words at these places."""
        return np.searchsorted(self.ends, places) - 1

    def places(self, word: int) -> list[int]:
        """Where the symbols of a word stand."""
        places, place = [], int(self.ends[word]) + 1
        while self.symbols[place] != BETWEEN:
            places.append(place)
            place = int(self.after[place])
        return places


class _Pairs:
    """How often each pair of neighbouring symbols occurs, kept up to date as pairs are merged.

    subword-nmt looks through all pairs for the best at every merge; here pairs of equal count share a level, which is
    sorted when it is reached. A pair whose count has gone down since is found out there, one whose count has gone up is
    entered anew; pairs below the threshold are in no level. All else is done as there, for its counts are not quite
    exact, and merges depend on them: what it prunes and forgets, what it counts twice, which words it skips.

    Memory: 63 bytes a letter of the distinct words while it is built (5 million words of 11 letters: 3.4 GB), 40 after.
    """

    def __init__(self, word_counts: Counter[str]) -> None:
        self.words = words = _Words(word_counts)
        first = np.flatnonzero((words.symbols[:-1] != BETWEEN) & (words.symbols[1:] != BETWEEN)).astype(np.int32)
        pairs = words.symbols[first].astype(np.int64) * RADIX + words.symbols[first + 1]
        self.last_letter = len(words.names) - 1
        self.sorted_places = {self.last_letter: _sort(pairs, first)}
        """The later symbol of a pair -> its pairs, where each starts among their places, their places. A pair comes up
        when the later of its symbols is new."""
        self.unsorted_places: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.more_places: defaultdict[int, list[int]] = defaultdict(list)
        """Those where a pair came up when neither symbol was new."""
        self.deviations: dict[int, dict[int, int]] = {}
        """pair -> word -> how many more times subword-nmt believes it there than it is."""
        keys, starts, places = self.sorted_places[self.last_letter]
        sums = np.add.reduceat(words.counts[places], starts[:-1]).tolist()
        self.counts: dict[int, int] = dict(zip(keys.tolist(), sums, strict=True))
        self.all_counts = dict(self.counts)  # those pruned from `counts` too
        self.threshold = max(self.counts.values()) / 10
        self._fill_levels()

    def best(self, index: int) -> tuple[int, int]:
        """The pair that merge number `index` is to join, and its count: of equal counts, the pair that sorts last."""
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
        """Put the pairs below the threshold aside."""
        threshold = self.threshold
        low = {pair: count for pair, count in self.counts.items() if count < threshold}
        for pair in low:
            del self.counts[pair]
        for pair in [pair for pair, count in low.items() if count < 0]:
            low[pair] += self.all_counts.get(pair, 0)
        self.all_counts |= low

    def merge(self, pair: int) -> Merge:
        """Join a pair wherever it occurs. Returns its names."""
        first, second = divmod(pair, RADIX)
        merge = self.words.names[first], self.words.names[second]
        is_new = "".join(merge) not in self.words.numbers
        joined, places = self.words.symbol("".join(merge)), self._places(pair)
        self.counts[pair] = 0
        by_word = places[:0]
        if not is_new or pair in self.deviations:
            by_word, places = places, by_word
        elif first == second and len(overlaps := places[np.isin(self.words.after[places], places)]):  # as in "aaa"
            is_by_word = np.isin(self.words.of(places), self.words.of(overlaps))
            by_word, places = places[is_by_word], places[~is_by_word]
        if len(places):
            self._merge_at(places, first, second, joined)
        if len(by_word) or pair in self.deviations:
            self._merge_by_word(by_word, pair, joined)
        self.counts[pair] = 0
        return merge

    def _places(self, pair: int) -> np.ndarray:
        """Where the first symbols of a pair stand now."""
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
        """Join two symbols at these places, to one that no word has yet."""
        symbols, before, after = self.words.symbols, self.words.before, self.words.after
        counts, gone = self.words.counts.take(places), after.take(places)
        left, right = before.take(places), after.take(gone)
        on_left, on_right = symbols.take(left).astype(np.int64), symbols.take(right).astype(np.int64)
        # Where the pair follows itself, the next occurrence takes away what stands between the two.
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
        """Join a pair word by word, as subword-nmt accounts for it, right or wrong."""
        first, second = divmod(pair, RADIX)
        occurrences, believed = Counter(self.words.of(places).tolist()), self.deviations.pop(pair, {})
        for word in {**occurrences, **believed}:
            if occurrences[word] + believed.get(word, 0) < 1:
                self._deviate(pair, word, -occurrences[word])
                continue
            old_places = self.words.places(word)
            old = self.words.symbols[old_places].tolist()
            new_places, new, at, changes = [], [], 0, Counter()
            while at < len(old):
                is_pair = old[at : at + 2] == [first, second]
                if is_pair:
                    if at:
                        changes[old[at - 1] * RADIX + first] -= 1
                    if at + 2 < len(old) and old[at + 2 : at + 4] != [first, second]:
                        changes[second * RADIX + old[at + 2]] -= 1
                new_places.append(old_places[at])
                new.append(joined if is_pair else old[at])
                at += 1 + is_pair
            for at, symbol in enumerate(new):
                if symbol == joined:
                    for neighbour in range(max(at - 1, 0), min(at + 1, len(new) - 1)):
                        if neighbour < at or new[at + 1] != joined:
                            changes[new[neighbour] * RADIX + new[neighbour + 1]] += 1
            self._replace(word, old_places, new_places, new)
            true = Counter(_pairs(new))
            true.subtract(_pairs(old))
            for each in {*changes, *true}:
                self._deviate(each, word, changes[each] - true[each] - (occurrences[word] if each == pair else 0))
            count = int(self.words.counts[new_places[0]])
            self._add(np.array([*changes], np.int64), np.array([*changes.values()], np.int64) * count)
            for each, place, neighbours in zip(_pairs(new), new_places, pairwise(new), strict=False):
                if joined in neighbours:
                    self.more_places[each].append(place)

    def _replace(self, word: int, old_places: list[int], new_places: list[int], new: list[int]) -> None:
        words, linked = self.words, [int(self.words.ends[word]), *new_places, int(self.words.ends[word + 1])]
        words.symbols[old_places] = GONE
        words.symbols[new_places] = new
        words.after[linked[:-1]], words.before[linked[1:]] = linked[1:], linked[:-1]

    def _deviate(self, pair: int, word: int, by: int) -> None:
        """Remember a miscount, and forget one that is made good."""
        if by:
            words = self.deviations.setdefault(pair, {})
            words[word] = words.get(word, 0) + by
            if not words[word]:
                del words[word]
            if not words:
                del self.deviations[pair]

    def _add(self, pairs: np.ndarray, changes: np.ndarray) -> None:
        """Change the counts of pairs, each of which may come several times."""
        counts, get, threshold = self.counts, self.counts.get, self.threshold
        if len(pairs) > MANY:
            pairs, index = np.unique(pairs, return_inverse=True)
            changes = np.bincount(index, changes).astype(np.int64)
        keys, changes = pairs.tolist(), changes.tolist()
        for pair, change in zip(keys, changes, strict=True):
            counts[pair] = get(pair, 0) + change
        for pair in {pair for pair, change in zip(keys, changes, strict=True) if change > 0}:
            if counts[pair] >= threshold:
                self._enter(pair)

    def _fill_levels(self) -> None:
        self.levels: dict[int, list[int]] = {}
        self.sorted_levels: dict[int, list[Entry]] = {}
        for pair, count in self.counts.items():
            self.levels.setdefault(count, []).append(pair)
        self.heights = [-count for count in self.levels]  # a heap: the highest first
        heapify(self.heights)

    def _enter(self, pair: int) -> None:
        """Put a pair where its count belongs."""
        count = self.counts[pair]
        if count in self.sorted_levels:
            insort(self.sorted_levels[count], self._entry(pair))
        elif count in self.levels:
            self.levels[count].append(pair)
        else:
            self.levels[count] = [pair]
            heappush(self.heights, -count)

    def _entry(self, pair: int) -> Entry:
        first, second = divmod(pair, RADIX)
        return self.words.names[first], self.words.names[second], pair

    def _top(self) -> tuple[int, int]:
        """The best pair and its count, (-1, 0) where none is left."""
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
    """Pairs and where each stands, by pair: the different pairs, where each starts among the places, the places."""
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[starts], np.append(starts, len(pairs)), places[order]


def _pairs(symbols: list[int]) -> list[int]:
    return [first * RADIX + second for first, second in pairwise(symbols)]


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
