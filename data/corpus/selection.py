"""Pass two of the corpus: which rows of all parts stay, and in which split.

The newest record of a PMID is the one in the latest file, and within that file the one with the highest version. A
deletion withdraws the earlier records of its PMID and version. Filters come after that, so an old version never
replaces a newest one that is dropped. Other text has no versions: all of it is new.

Memory: the keys of a row take 26 bytes while there are at most 8 cleaning rules (PMID 8, hash of the text 8, words 4,
version 2, and a byte each for deletion, filter, cleaning rules and split), so 38 million rows take 1.0 GB. Sorting is
done in 16 shares, each of which takes about 0.2 GB.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.common.hashing import mix64
from data.common.parquet import SPLITS
from data.common.workers import progress
from data.corpus import cleaning, filters
from data.corpus.duplicates import repeats
from data.corpus.filters import EXCLUDED, RETRACTED, filter_code, first_filter, reasons
from data.corpus.near_duplicates import near_duplicates
from data.corpus.settings import CorpusSection

LEFT_OUT, NOT_NEWEST = len(SPLITS), len(SPLITS) + 1  # in place of the index of a split
ROWS_PER_BATCH = 10_000  # read from a part at once
ROWS_AT_ONCE = 1 << 20  # of all rows: temporary arrays of all of them would take too much memory
SHARES = 16  # into which rows are divided for sorting
COLUMNS = ("pmid", "version", "deleted", "words", "cleaned", "text_hash")  # of parts, beside those of the filters


class Keys:
    """What the selection needs to know of all rows. A row's position counts through all parts in order."""

    def __init__(self, parts: list[Path], settings: CorpusSection, excluded: np.ndarray) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(pq.read_metadata(part).num_rows for part in parts)])
        rows = int(self.starts[-1])
        self.pmid, self.text_hash = np.empty(rows, np.int64), np.empty(rows, np.uint64)
        self.version, self.words = np.empty(rows, np.int16), np.empty(rows, np.uint32)
        self.deleted, self.cleaned = np.empty(rows, bool), np.empty(rows, cleaning.changed_type())
        self.filter = np.empty(rows, np.uint8)  # see filters.first_filter
        columns = list(dict.fromkeys((*COLUMNS, *(name for each in filters.FILTERS for name in each.columns))))
        with progress("corpus: choosing", len(parts)) as advance:
            for part, start in zip(parts, self.starts, strict=False):
                for batch in pq.ParquetFile(part).iter_batches(ROWS_PER_BATCH, columns=columns):
                    here = slice(start, start := start + len(batch))
                    self._load(here, batch)
                    self.filter[here] = first_filter(batch, settings, excluded)
                advance()
        self._exclude_equal_texts(filter_code(EXCLUDED, settings))

    def _load(self, here: slice, batch: pa.RecordBatch) -> None:
        self.pmid[here], self.text_hash[here] = batch["pmid"], batch["text_hash"]
        self.version[here] = np.minimum(batch["version"], 2**15 - 1)
        self.words[here], self.cleaned[here] = batch["words"], batch["cleaned"]
        self.deleted[here] = batch["deleted"].to_numpy(False)

    def _exclude_equal_texts(self, code: int) -> None:
        """Drop the text of an excluded PMID under other PMIDs too. code: that of the filter."""
        texts = np.unique(self.text_hash[self.filter == code])
        for start in range(0, len(self.filter) if len(texts) else 0, ROWS_AT_ONCE):
            here = slice(start, start + ROWS_AT_ONCE)
            self.filter[here][(self.filter[here] == 0) & np.isin(self.text_hash[here], texts)] = code


def select_rows(
    keys: Keys,
    settings: CorpusSection,
    validation_fraction: float,
    test_fraction: float,
    in_benchmarks: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """For each row the index of its split, LEFT_OUT or NOT_NEWEST (uint8); and the counts of the manifest.

    in_benchmarks: rows to leave out because they hold items of benchmarks.
    """
    newest, counts = _newest_records(keys)
    stays = newest.copy()
    for code, (name, value) in enumerate(reasons(settings), start=1):
        dropped = int((stays & (keys.filter == code)).sum())
        counts[name] = counts.get(name, {}) | {value: dropped} if value else dropped
    stays &= keys.filter == 0
    if in_benchmarks is not None:
        before = int(stays.sum())
        stays[in_benchmarks] = False
        counts["in_benchmarks"] = before - int(stays.sum())
    counts["duplicates"] = _drop_duplicates(keys, stays) if settings.drop_duplicates else 0
    counts["near_duplicates"] = _drop_near_duplicates(keys, stays) if settings.drop_near_duplicates else 0
    counts["words"] = int(keys.words[stays].sum(dtype=np.int64))
    for index, rule in enumerate(cleaning.RULES):
        bit = keys.cleaned.dtype.type(1 << index)
        counts[rule.name] = int((stays & (keys.cleaned & bit > 0)).sum())
    split_of_row = _draw_splits(keys.pmid, stays, validation_fraction, test_fraction)
    split_of_row[~newest] = NOT_NEWEST
    return split_of_row, counts | {split: int((split_of_row == index).sum()) for index, split in enumerate(SPLITS)}


def _newest_records(keys: Keys) -> tuple[np.ndarray, dict[str, Any]]:
    """Mask of the newest record of each PMID that is not deleted, and the counts of the others."""
    rows = len(keys.pmid)
    withdrawn, newest = np.zeros(rows, bool), np.zeros(rows, bool)
    share_of_row = keys.pmid.astype(np.uint8) % SHARES
    for share in range(SHARES):
        _mark_newest(keys, np.flatnonzero(share_of_row == share), withdrawn, newest)
    records, deleted = int((~keys.deleted).sum()), int(withdrawn.sum())
    superseded = records - deleted - int(newest.sum())
    return newest, {
        "records": records,
        "deletions": rows - records,
        "deleted": deleted,
        "superseded": superseded,
    }


def _mark_newest(keys: Keys, rows: np.ndarray, withdrawn: np.ndarray, newest: np.ndarray) -> None:
    """Mark in `withdrawn` the records that a deletion withdraws, and in `newest` the newest of each PMID's others.

    rows: all rows of some PMIDs. Every record of other text, which has negative numbers, is marked as newest.
    """
    pmid, version, deleted = keys.pmid[rows], keys.version[rows], keys.deleted[rows]
    gone = deleted.copy()
    later_deletions: set[tuple[int, int]] = set()
    for index in np.flatnonzero(np.isin(pmid, pmid[deleted]))[::-1]:
        record = (int(pmid[index]), int(version[index]))
        if deleted[index]:
            later_deletions.add(record)
        elif record in later_deletions:
            withdrawn[rows[index]] = gone[index] = True
    alive = np.flatnonzero(~gone)
    file = np.searchsorted(keys.starts, rows[alive], "right")
    # The sort is stable: of records with equal keys, the one that stands later in its file comes last.
    order = alive[np.lexsort((version[alive], file, pmid[alive]))]
    newest[rows[order[_last_of_each(pmid[order]) | (pmid[order] < 0)]]] = True


def _last_of_each(ordered: np.ndarray) -> np.ndarray:
    """Mask of the last entry of each run of equal values."""
    return np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]


def _drop_duplicates(keys: Keys, stays: np.ndarray) -> int:
    """Clear in `stays` all rows of equal text but the one with the lowest PMID. Returns how many were cleared."""
    before = int(stays.sum())
    share_of_row = keys.text_hash.astype(np.uint8) % SHARES
    for share in range(SHARES):
        here = np.flatnonzero(stays & (share_of_row == share))
        stays[repeats(keys.text_hash[here], keys.pmid[here], here)] = False
    return before - int(stays.sum())


def _drop_near_duplicates(keys: Keys, stays: np.ndarray) -> int:
    """Clear in `stays` the rows that nearly repeat one with a lower PMID. Returns how many were cleared."""
    near = near_duplicates([part.parent for part in keys.parts], keys.starts, keys.pmid, stays)
    stays &= ~near
    return int(near.sum())


def _draw_splits(pmid: np.ndarray, stays: np.ndarray, validation_fraction: float, test_fraction: float) -> np.ndarray:
    """For each row the index of its split, or LEFT_OUT; uint8. It depends on the PMID alone."""
    split_of_row = np.full(len(pmid), LEFT_OUT, np.uint8)
    for start in range(0, len(pmid), ROWS_AT_ONCE):
        here = start + np.flatnonzero(stays[start : start + ROWS_AT_ONCE])
        drawn = mix64(pmid[here], salt=0) / 2.0**64
        split_of_row[here] = np.where(drawn < test_fraction, 2, drawn < test_fraction + validation_fraction)
    return split_of_row


def funnel(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """The counts as (name, number) for a table: records read, dropped and kept, and those that cleaning changed."""
    by_name = [each.name for each in filters.FILTERS if not each.counted_by]
    # Manifests of earlier versions count one type, under a name of its own.
    types = counts.get("publication_types", {RETRACTED: counts["retracted"]} if "retracted" in counts else {})
    kept = sum(counts[split] for split in SPLITS)
    last_steps = ("in_benchmarks", "duplicates", "near_duplicates")
    return [
        *((f"not read: {name}", number) for name, number in counts.get("not_read", {}).items()),
        ("records read", counts["records"]),
        *((f"- {name.replace('_', ' ')}", counts.get(name, 0)) for name in ("superseded", "deleted", *by_name)),
        *((f"- type: {name}", number) for name, number in types.items()),
        *((f"- {name.replace('_', ' ')}", counts.get(name, 0)) for name in last_steps),
        ("kept", kept),
        *((f"  {split}", counts[split]) for split in SPLITS),
        ("words", counts["words"]),
        *((f"{rule.name.replace('_', ' ')}: records", counts.get(rule.name, 0)) for rule in cleaning.RULES),
    ]
