"""Pass two of the corpus: which rows of all parts stay, and in which split.

The newest record of a PMID is the one of the latest file, and in that file of the highest version. A deletion
withdraws the occurrences of its PMID and version that stand before it. Filters come after: an old version never comes
back where the newest is dropped. Other text has no versions, and no title, year or language that could drop it.

Memory: a row's keys are 26 bytes (PMID 8, hash of the text 8, words 4, version 2, and a byte each for deletion, filter,
cleaning rules and split), so 38 million take 1.0 GB; sorting is done in 16 shares, some 0.2 GB.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.common.hashing import mix64
from data.common.parquet import SPLITS
from data.common.workers import progress
from data.corpus.cleaning import CLEANING, CorpusSection
from data.corpus.near_duplicates import near_duplicates, repeats

LEFT_OUT = len(SPLITS)  # in place of a split's index
BATCH = 10_000  # rows of a part that are looked at together
PIECE = 1 << 20  # rows of all that are worked on together, for the memory's sake
SHARES = 16  # in which keys are sorted
KEYS = ("pmid", "version", "deleted", "year", "languages", "retracted", "fields", "words", "cleaned", "text_hash")
FILTERS = ("without_title_or_abstract", "excluded", "other_language", "other_year", "short", "retracted")
EXCLUDED = 1 + FILTERS.index("excluded")


class Keys:
    """What the choice of rows needs to know of all parts, a row's position being that in all parts in order."""

    def __init__(self, parts: list[Path], settings: CorpusSection, excluded: np.ndarray) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(pq.read_metadata(part).num_rows for part in parts)])
        rows = int(self.starts[-1])
        self.pmid, self.text_hash = np.empty(rows, np.int64), np.empty(rows, np.uint64)
        self.version, self.words = np.empty(rows, np.int16), np.empty(rows, np.uint32)
        self.deleted, self.cleaned = np.empty(rows, bool), np.empty(rows, np.uint8)
        self.filter = np.empty(rows, np.uint8)  # 1 + the index in FILTERS of the first that drops the row, or 0
        with progress("corpus: choosing", len(parts)) as advance:
            for part, start in zip(parts, self.starts, strict=False):
                for batch in pq.ParquetFile(part).iter_batches(BATCH, columns=list(KEYS)):
                    here = slice(start, start := start + len(batch))
                    self.pmid[here], self.text_hash[here] = batch["pmid"], batch["text_hash"]
                    self.version[here] = np.minimum(batch["version"], 2**15 - 1)
                    self.words[here] = batch["words"]
                    self.deleted[here], self.cleaned[here] = batch["deleted"].to_numpy(False), batch["cleaned"]
                    self.filter[here] = first_filter(batch, settings, excluded)
                advance()
        self._exclude_equal_texts()

    def _exclude_equal_texts(self) -> None:
        """The text of an excluded PMID is not trained on under another."""
        texts = np.unique(self.text_hash[self.filter == EXCLUDED])
        for start in range(0, len(self.filter) if len(texts) else 0, PIECE):
            here = slice(start, start + PIECE)
            self.filter[here][(self.filter[here] == 0) & np.isin(self.text_hash[here], texts)] = EXCLUDED


def first_filter(batch: pa.RecordBatch, settings: CorpusSection, excluded: np.ndarray) -> np.ndarray:
    """For each record 1 + the index in FILTERS of the first filter that drops it, or 0."""
    pubmed = batch["pmid"].to_numpy() >= 0
    needed = np.where(pubmed & settings.title_and_abstract, 2, 1)
    year = pc.fill_null(batch["year"], -1).to_numpy()
    first, last, wanted = settings.first_year or -1, settings.last_year or 9999, set(settings.languages)
    other = {text: wanted.isdisjoint(text.split()) for text in batch["languages"].unique().to_pylist()}
    drops = {
        "without_title_or_abstract": batch["fields"].to_numpy() < needed,
        "other_language": pubmed & [bool(wanted) and other[text] for text in batch["languages"].to_pylist()],
        "other_year": pubmed & ((year < first) | (year > last) | ((year < 0) & (settings.last_year is not None))),
        "short": batch["words"].to_numpy() < settings.minimum_words,
        "retracted": batch["retracted"].to_numpy(False) & settings.drop_retracted,
        "excluded": np.isin(batch["pmid"].to_numpy(), excluded),
    }
    return np.select([drops[name] for name in FILTERS], range(1, len(FILTERS) + 1), 0)


def choose_rows(
    keys: Keys, settings: CorpusSection, validation_fraction: float, test_fraction: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Pass two: for each row the index of its split, or LEFT_OUT; and the counts of the funnel."""
    rows = len(keys.pmid)
    withdrawn, stays = np.zeros(rows, bool), np.zeros(rows, bool)
    share_of_row = keys.pmid.astype(np.uint8) % SHARES
    for share in range(SHARES):
        _mark_newest(keys, np.flatnonzero(share_of_row == share), withdrawn, stays)
    records, newest = int((~keys.deleted).sum()), int(stays.sum())
    counts: dict[str, Any] = {"records": records, "deletions": rows - records}
    counts["deleted"] = int(withdrawn.sum())
    counts["superseded"] = records - counts["deleted"] - newest
    for code, name in enumerate(FILTERS, start=1):
        counts[name] = int((stays & (keys.filter == code)).sum())
    stays &= keys.filter == 0
    kept = int(stays.sum())
    if settings.drop_duplicates:
        share_of_row = keys.text_hash.astype(np.uint8) % SHARES
        for share in range(SHARES):
            here = np.flatnonzero(stays & (share_of_row == share))
            stays[repeats(keys.text_hash[here], keys.pmid[here], here)] = False
    counts["duplicates"] = kept - int(stays.sum())
    counts["near_duplicates"] = 0
    if settings.drop_near_duplicates:
        near = near_duplicates([part.parent for part in keys.parts], keys.starts, keys.pmid, stays)
        counts["near_duplicates"] = int(near.sum())
        stays &= ~near
    counts["words"] = int(keys.words[stays].sum(dtype=np.int64))
    for bit, rule in enumerate(CLEANING):
        counts[rule.__name__] = int((stays & (keys.cleaned & (1 << bit) > 0)).sum())
    split_of_row = np.full(rows, LEFT_OUT, np.uint8)
    for start in range(0, rows, PIECE):
        here = start + np.flatnonzero(stays[start : start + PIECE])
        drawn = mix64(keys.pmid[here], salt=0) / 2.0**64
        split_of_row[here] = np.where(drawn < test_fraction, 2, drawn < test_fraction + validation_fraction)
    return split_of_row, counts | {split: int((split_of_row == index).sum()) for index, split in enumerate(SPLITS)}


def _mark_newest(keys: Keys, rows: np.ndarray, withdrawn: np.ndarray, newest: np.ndarray) -> None:
    """Of the PMIDs of these rows, mark the records that a deletion withdraws, and the newest of each of the others.

    Other text, whose numbers are negative, has no versions: all of it is new.
    """
    pmid, version, deleted = keys.pmid[rows], keys.version[rows], keys.deleted[rows]
    gone = deleted.copy()
    later: set[tuple[int, int]] = set()
    for index in np.flatnonzero(np.isin(pmid, pmid[deleted]))[::-1]:
        record = (int(pmid[index]), int(version[index]))
        if deleted[index]:
            later.add(record)
        elif record in later:
            withdrawn[rows[index]] = gone[index] = True
    alive = np.flatnonzero(~gone)
    file = np.searchsorted(keys.starts, rows[alive], "right")
    # A stable sort: the last of equals is the later in its file.
    order = alive[np.lexsort((version[alive], file, pmid[alive]))]
    newest[rows[order[_last_of_each(pmid[order]) | (pmid[order] < 0)]]] = True


def _last_of_each(ordered: np.ndarray) -> np.ndarray:
    """Mask of the last of each run of equal keys."""
    return np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]


def funnel(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """Counts as a table: what was read, what left on the way, what is kept, what cleaning changed in it."""
    dropped = ["superseded", "deleted", *FILTERS, "duplicates", "near_duplicates"]
    kept = sum(counts[split] for split in SPLITS)
    return [
        ("records read", counts["records"]),
        *((f"- {name.replace('_', ' ')}", counts[name]) for name in dropped),
        ("kept", kept),
        *((f"  {split}", counts[split]) for split in SPLITS),
        ("words", counts["words"]),
        *((f"{rule.__name__.replace('_', ' ')}: records", counts[rule.__name__]) for rule in CLEANING),
    ]
