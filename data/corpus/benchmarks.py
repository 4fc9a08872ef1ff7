"""Benchmarks: which records of the corpus hold their items, found by PMID and by text (`passages`).

After pass one each part is searched, in parallel. What was found stays in `OUT.parts/.matches`, so that a part is
searched again only for other items. Records that hold an item leave the corpus, unless the benchmarks are only
reported; `benchmarks.json` in the corpus says what was found.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from data.common.files import json_bytes, read_json, write_json
from data.common.lease import Lease
from data.common.parquet import SPLITS
from data.common.workers import Task, Workers, run_tasks
from data.corpus.output import part_sha256
from data.corpus.parts import PART_FILE
from data.corpus.passages import VERSION, Passages, is_long_enough
from data.corpus.schema import join_text
from data.corpus.selection import NOT_NEWEST, Keys

REPORT = "benchmarks.json"  # in the corpus
ITEMS, MATCHES = ".benchmarks.json", ".matches"  # in the folder of parts; the first only until the corpus is finished
FOUND = "matches.json"  # in the folder of MATCHES that each part has
COUNTS = ("items", "not_searched", "in_input", "in_training")  # of each split of each benchmark
ROWS_PER_BATCH = 1_000  # read from a part at once


class BenchmarkItem(NamedTuple):
    """An item of a benchmark: a question, a sentence or an abstract."""

    benchmark: str
    split: str
    id: str
    pmid: int | None
    text: str


@dataclass(frozen=True)
class Benchmarks:
    """The items that training must not see, or that are only reported."""

    items: list[BenchmarkItem]
    keep: bool = False
    """Leave the records in the corpus."""

    def request(self) -> dict[str, Any]:
        """What the manifest of a corpus records: a sha256 of the items of each benchmark, the rule, and `keep`."""
        names = dict.fromkeys(item.benchmark for item in self.items)
        hashes = {name: _sha256([item for item in self.items if item.benchmark == name]) for name in names}
        return {"items": hashes, "rule": VERSION, "keep": self.keep}


class Match(NamedTuple):
    """A record that holds an item."""

    row: int
    """Of all rows of all parts."""
    item: int
    """Its place in the list of items."""
    by_pmid: bool
    share: float
    """The share of the item's runs of letters that the record's text holds; 0 if the text does not hold the item."""


def find_matches(
    parts: list[Task], starts: np.ndarray, items: list[BenchmarkItem], workers: Workers, lease: Lease | None = None
) -> list[Match]:
    """The records of all parts that hold an item, in order. parts: the tasks of pass one; starts: their first rows."""
    folder = parts[0].folder.parent
    write_json(folder / ITEMS, items)
    digest = _sha256(items)
    tasks = [
        Task(
            "corpus part",
            folder / ITEMS,
            digest,
            folder / MATCHES / part.folder.name,
            {"items": digest, "rule": VERSION, "part": part.folder.name, "sha256": part_sha256(part)},
        )
        for part in parts
    ]
    run_tasks(find_items, tasks, workers, "corpus: looking for benchmarks", lease)
    found = (read_json(task.folder / FOUND) for task in tasks)
    return [
        Match(int(start) + row, *others)
        for start, of_part in zip(starts, found, strict=False)
        for row, *others in of_part
    ]


def find_items(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Look for all items in one part, and write what was found as FOUND: a list of matches. Returns their number.

    source: the file of the items, beside the parts; settings: the name of the part, and what the result depends on.
    """
    numbers_of_pmid, passages = _load(source, settings["items"])
    matches: list[Match] = []
    file, first = pq.ParquetFile(source.parent / settings["part"] / PART_FILE), 0
    for batch in file.iter_batches(ROWS_PER_BATCH, columns=["pmid", "title", "abstract"]):
        pmids, titles, abstracts = (column.to_pylist() for column in batch.columns)
        shares = {(row, item): share for row, item, share in passages.find(map(join_text, titles, abstracts))}
        by_pmid = {(row, item) for row, pmid in enumerate(pmids) for item in numbers_of_pmid.get(pmid, ())}
        for row, item in sorted(by_pmid | shares.keys()):
            matches.append(Match(first + row, item, (row, item) in by_pmid, round(shares.get((row, item), 0.0), 4)))
        first += len(pmids)
    write_json(folder / FOUND, matches)
    return {"matches": len(matches)}


@lru_cache(maxsize=1)
def _load(path: Path, _: str) -> tuple[dict[int, list[int]], Passages]:
    """The numbers of the items of each PMID, and the texts of all, for one task of this process after another.

    _: the sha256 of the items, so that other items are loaded again.
    """
    items = [BenchmarkItem(*values) for values in read_json(path)]
    numbers: dict[int, list[int]] = {}
    for number, item in enumerate(items):
        if item.pmid is not None:
            numbers.setdefault(item.pmid, []).append(number)
    return numbers, Passages(item.text for item in items)


def write_report(
    folder: Path, items: list[BenchmarkItem], matches: list[Match], keys: Keys, sources: list[str], splits: np.ndarray
) -> dict[str, Any]:
    """Write REPORT: of each benchmark and split the counts, and every record that holds one of its items.

    Only the newest record of each PMID counts. Returns the counts, which are described in docs/download-and-corpus.md.
    sources: the name of each part; splits: the index of each row's split, from `selection.select_rows`.
    """
    newest = [match for match in matches if splits[match.row] != NOT_NEWEST]
    in_input = {match.item for match in newest}
    in_training = {match.item for match in newest if splits[match.row] == SPLITS.index("train")}
    total: dict[str, dict[str, dict[str, int]]] = {}
    for number, item in enumerate(items):
        counts = total.setdefault(item.benchmark, {}).setdefault(item.split, dict.fromkeys(COUNTS, 0))
        counts["items"] += 1
        counts["not_searched"] += item.pmid is None and not is_long_enough(item.text)
        counts["in_input"] += number in in_input
        counts["in_training"] += number in in_training
    entries = [_entry(match, items[match.item], keys, sources, splits) for match in newest]
    write_json(folder / REPORT, {"counts": total, "records": entries})
    return total


def _entry(
    match: Match, item: BenchmarkItem, keys: Keys, sources: list[str], splits: np.ndarray
) -> dict[str, str | int | float]:
    """What the report says about a match."""
    by = [name for name, is_so in (("pmid", match.by_pmid), ("text", match.share > 0)) if is_so]
    return {
        "benchmark": item.benchmark,
        "split": item.split,
        "item": item.id,
        "pmid": int(keys.pmid[match.row]),
        "source_file": sources[int(np.searchsorted(keys.starts, match.row, "right")) - 1],
        "matched_by": " and ".join(by),
        "share_of_text": match.share,
        "record": [*SPLITS, "left out"][splits[match.row]],
    }


def _sha256(items: list[BenchmarkItem]) -> str:
    return hashlib.sha256(json_bytes(items)).hexdigest()
